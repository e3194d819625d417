"""The pods of a training, and how often they are started again."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from luthier_api.base import ApiModel, Rule
from luthier_api.decides import CIRCUMSTANCES, LAYOUT
from luthier_api.quantity import Bytes, Cores, GpuBytes
from luthier_api.spec import ObjectName


class TrainingResources(ApiModel):
    """The pods that train: one a node."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods, each on a node of its own where there are enough."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs of each pod, one process on each. 0: train on CPU."""
    processes_per_node: Annotated[int | None, Field(ge=1, le=64)] = None
    """Processes of each pod of a CPU job; 1 when left out."""
    gpu_class: Annotated[ObjectName | None, LAYOUT] = None
    """Kind of GPU, by the name that the administrator has given it (`gpuClasses` of the chart): which resource is
    requested, on which nodes, and for how much memory the run is planned. Left out: that of the namespace, or else any
    GPU.
    """
    gpu_memory: Annotated[GpuBytes | None, LAYOUT] = None
    """Memory of one GPU, for which the run is planned, for example 80Gi. Left out: that of the class of GPUs, if the
    administrator has given it. Only the plan depends on it: it requests nothing.
    """
    cpu: Annotated[Cores | None, CIRCUMSTANCES] = None
    """CPU request of each pod, in cores, for example 16 or 500m; none when left out."""
    memory: Annotated[Bytes | None, CIRCUMSTANCES] = None
    """Memory request and limit of each pod, for example 64Gi; neither when left out."""
    ephemeral_storage: Annotated[Bytes | None, CIRCUMSTANCES] = None
    """Local disk of each pod for /tmp, as request and limit, for example 50Gi. Left out: no request, and the limit that
    the administrator has set (`jobs.tmpSize` of the chart; 20Gi if they have not).
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.gpuClass) || self.gpusPerNode > 0",
            "resources.gpuClass: the job requests no GPUs; remove it, or set gpusPerNode",
        ),
        Rule(
            "!has(self.gpuMemory) || self.gpusPerNode > 0",
            "resources.gpuMemory: the job requests no GPUs; remove it, or set gpusPerNode. On CPU a run is planned for"
            " resources.memory",
        ),
        Rule(
            "!has(self.processesPerNode) || self.gpusPerNode == 0",
            "resources.processesPerNode: a GPU job runs one process a GPU; remove it, or set gpusPerNode: 0 to train"
            " on CPU",
        ),
    )

    @property
    def gpus_per_pod(self) -> int:
        return self.gpus_per_node

    @property
    def processes(self) -> int:
        """Processes of each pod."""
        return self.gpus_per_node or self.processes_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes over all pods."""
        return self.nodes * self.processes


class Restarts(ApiModel):
    """How often a failed run is started again."""

    max: Annotated[int, Field(ge=0, le=100)] = 3
    """Restarts after failures of the infrastructure. User errors are never retried, and preemptions do not count. Read
    when the run is created: to apply a change to a running job, suspend and resume it.
    """
