"""Which device and precision a shard works with, and how that is written down beside its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import torch

from luthier_api.generate import GenerateJobSpec
from luthier_trainer.runtime.devices import DTYPES, assert_gpus, fitting_precision


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
        if self.device == "cuda":
            return f"{versions}, {torch.cuda.get_device_name()}"
        return f"{versions}, cpu with {torch.get_num_threads()} threads"


def find_hardware(spec: GenerateJobSpec) -> Hardware:
    """The device that the job asks for. Raises Failure when it asks for a GPU and torch can use none."""
    assert_gpus(spec.resources.gpus, "spec.resources.gpus")
    cpu = spec.resources.gpus == 0
    # Library algorithms that differ from run to run are off; outputs are promised to repeat.
    torch.backends.cudnn.deterministic = True
    return Hardware("cpu" if cpu else "cuda", fitting_precision(cpu) if spec.precision == "auto" else spec.precision)
