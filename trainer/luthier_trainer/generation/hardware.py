"""Which device and precision a shard works with, and how that is written down beside its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import torch

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_trainer.ending import Failure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Hardware:
    device: str
    """cuda or cpu."""
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def environment(self) -> str:
        """What outputs are bit-identical within: library versions, GPU model, or on CPU the number of threads."""
        versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "diffusers"))
        return f"{versions}, {torch.cuda.get_device_name() if self.device == 'cuda' else f'cpu with {torch.get_num_threads()} threads'}"


def find_hardware(spec: GenerateJobSpec) -> Hardware:
    """The device that the job asks for. Raises Failure when it asks for a GPU and none is visible."""
    if spec.resources.gpus == 0:
        return Hardware("cpu", "fp32" if spec.precision == "auto" else spec.precision)
    if not torch.cuda.is_available():
        raise Failure(
            ExitCode.MISCONFIGURED,
            "spec.resources.gpus: 1 GPU is asked for and torch sees none. Check the driver and the device plugin of the node and that the"
            " trainer image has a torch with CUDA, or set resources.gpus: 0 to run on CPU",
        )
    # Library algorithms that differ from run to run are off; outputs are promised to repeat.
    torch.backends.cudnn.deterministic = True
    # GPUs before Ampere only emulate bf16.
    fitting = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return Hardware("cuda", fitting if spec.precision == "auto" else spec.precision)
