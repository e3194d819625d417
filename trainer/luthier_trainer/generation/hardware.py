"""The device and the precision of a shard, and how they are recorded beside its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

import torch

from luthier_api.generate import GenerateJobSpec
from luthier_trainer.runtime.devices import DTYPES, assert_gpus, fitting_precision


@dataclass(frozen=True)
class Hardware:
    """The device and the precision of a shard."""

    device: str
    """cuda or cpu."""
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of torch for `precision`."""
        return DTYPES[self.precision]

    @property
    def environment(self) -> str:
        """Library versions and GPU model, or number of CPU threads. With the same ones, outputs are bit-identical."""
        versions = ", ".join(f"{p} {version(p)}" for p in ("luthier", "torch", "transformers", "diffusers"))
        if self.device == "cuda":
            return f"{versions}, {torch.cuda.get_device_name()}"
        return f"{versions}, cpu with {torch.get_num_threads()} threads"


def find_hardware(spec: GenerateJobSpec) -> Hardware:
    """Return device and precision for the job. Raises Failure if it asks for a GPU and torch can use none."""
    assert_gpus(spec.resources.gpus, "spec.resources.gpus")
    cpu = spec.resources.gpus == 0
    # Nondeterministic algorithms are disabled, because outputs have to be reproducible.
    torch.backends.cudnn.deterministic = True
    return Hardware("cpu" if cpu else "cuda", fitting_precision(cpu) if spec.precision == "auto" else spec.precision)
