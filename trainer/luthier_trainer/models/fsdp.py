"""FSDP2 of torch: every process holds some rows of each weight, and blocks are gathered when they compute.

transformers 5.23 can let each process read its own rows of each tensor (`DistributedConfig`), but applies FSDP before
an adapter is added, whose weights would then be whole on each GPU. Here a model is loaded in shards (`in_shards`), gets
its adapter, and only then FSDP (`fully_sharded`). transformers' Trainer leaves the wrapping of such a model to it.
accelerate's plugin for FSDP is not used: on CPUs it silently trains with DDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig, mixin

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure

ROWS = (Shard(0),)
"""How weights are divided: each process has an equal number of rows, the last ones fewer or none."""


def loading_options(processes: int) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` with which each process reads its own rows, within `in_shards`."""
    # transformers wants a plan of its own, which `in_shards` does not use.
    return {"distributed_config": DistributedConfig(fsdp_size=processes, fsdp_plan={"": "free_full_weight"})}


@contextmanager
def in_shards() -> Iterator[None]:
    """Within this context, `from_pretrained` with `loading_options` divides weights, and leaves FSDP to us."""
    apply = mixin.apply_fully_sharded_data_parallelism

    def divide(model: PreTrainedModel, meshes: Any, *_: Any) -> PreTrainedModel:
        mesh = meshes.get_mesh("fsdp")
        divided: dict[int, torch.nn.Parameter] = {}
        for module in read_in_shards(model):
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim and not isinstance(weight, DTensor):
                    made = torch.nn.Parameter(shard_of(weight, mesh), requires_grad=weight.requires_grad)
                    module._parameters[name] = divided.setdefault(id(weight), made)
        return model

    mixin.apply_fully_sharded_data_parallelism = divide
    try:
        yield
    finally:
        mixin.apply_fully_sharded_data_parallelism = apply


def read_in_shards(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Yield the modules whose own weights are read in shards: those in blocks, embeddings, and the output layer.

    All others are small, and some of them are new: a head begins with the same random values on all processes.
    """
    for block in blocks(model):
        yield from block.modules()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings():
            yield module


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the parts that are gathered one after another: the elements of the outermost lists of modules."""
    found: list[torch.nn.Module] = []

    def look(module: torch.nn.Module) -> None:
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList):
                found.extend(part for part in child if computes(part) and any(True for _ in part.parameters()))
            else:
                look(child)

    look(model)
    return found


def computes(module: torch.nn.Module) -> bool:
    """Return whether a module is called, instead of only its parts."""
    return not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)


def shard_of(weight: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Return this process's rows of a weight as a part of the whole."""
    rows = torch.chunk(weight.detach(), mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    own = rows[rank] if rank < len(rows) else weight.detach()[:0]
    return whole_of(own.clone(), weight, mesh)


def whole_of(own: torch.Tensor, weight: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Return a tensor with the shape of `weight`, of which this process holds the rows `own`."""
    return DTensor.from_local(own, mesh, ROWS, run_check=False, shape=weight.shape, stride=weight.stride())


def fully_sharded(model: Any, half: bool) -> None:
    """Apply FSDP to a model that was loaded `in_shards`, with its adapters and new modules, in place.

    Each of the `blocks` is a unit; all else is the unit of the model itself, which stays gathered from the forward pass
    to the end of the backward pass: embeddings and heads. No process ever holds a whole block at rest. `half`: whether
    weights in fp32 are gathered in bf16; gradients are summed in fp32.
    """
    mesh = base_of(model)._mesh_manager.get_mesh("fsdp")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    # FSDP would take the rows of a divided weight for a whole one: it is shown outlines, and then given the rows.
    held = {id(weight): weight for weight in model.parameters()}
    outlines = {key: outline(weight) for key, weight in held.items()}
    places = [(m, name, id(w)) for m in model.modules() for name, w in m.named_parameters(recurse=False)]
    for module, name, key in places:
        module._parameters[name] = outlines[key]
    for part in [*blocks(model), model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
        if mesh.device_type == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    given: dict[int, torch.nn.Parameter] = {}
    for module, name, key in places:
        if key not in given:
            weight = held.pop(key)
            rows = kept_rows(weight.detach(), mesh) if isinstance(weight, DTensor) else shard_of(weight, mesh)
            given[key] = torch.nn.Parameter(rows, requires_grad=weight.requires_grad)
        module._parameters[name] = given[key]
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    # transformers would gather all weights at once to save them, which `saving` does part by part.
    del base_of(model).config.distributed_config


def kept_rows(weight: DTensor, mesh: DeviceMesh) -> DTensor:
    """Return a divided weight that holds nothing but its rows: those in the host's memory may be a part of a file."""
    own = weight.to_local()
    return weight if own.untyped_storage().nbytes() == own.nbytes else whole_of(own.clone(), weight, mesh)


def outline(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a weight of the same shape without values. Raises Failure if it has no rows."""
    if not weight.ndim:
        raise Failure(
            ExitCode.INVALID_SPEC,
            "spec.strategy: fsdp divides the rows of weights, and the model has a weight that is a single number; use"
            " zero3 or ddp",
        )
    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    return torch.nn.Parameter(empty, requires_grad=weight.requires_grad)


def base_of(model: Any) -> Any:
    """Return the model of transformers, without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_sharded(model: Any) -> bool:
    """Return whether FSDP divides the model."""
    return isinstance(model, FSDPModule)


def units(model: Any) -> int:
    """Return the number of parts that are gathered each for itself."""
    return sum(isinstance(module, FSDPModule) for module in model.modules())


def at_rest(model: Any) -> Mapping[str, DTensor]:
    """Return name → weight, of which this process has its rows. What was gathered is freed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def own_rows(model: Any) -> dict[str, torch.Tensor]:
    """Return name → this process's rows of each weight that learns."""
    return {name: weight.to_local().detach() for name, weight in at_rest(model).items() if weight.requires_grad}


def load_rows(model: Any, rows: Mapping[str, torch.Tensor], origin: str) -> None:
    """Put rows that `own_rows` has returned into the model. Raises Failure if they are not those of its weights."""
    own = own_rows(model)
    if {name: rows[name].shape for name in rows} != {name: tensor.shape for name, tensor in own.items()}:
        raise Failure(ExitCode.TRAINING_ERROR, f"{origin}: has other weights than those that learn here")
    for name, tensor in own.items():
        tensor.copy_(rows[name])


def without_wholes(state: Any) -> Any:
    """Return the state of an optimiser with this process's rows in the place of divided tensors."""
    if isinstance(state, DTensor):
        return state.to_local()
    if isinstance(state, dict):
        return {key: without_wholes(value) for key, value in state.items()}
    if isinstance(state, list):
        return [without_wholes(value) for value in state]
    return state


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `without_wholes` has made of the state of an optimiser."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, weight in zip(numbers, weights, strict=True):
        kept = state["state"].get(number, {})
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                kept[name] = whole_of(value.to(weight.device, copy=True), weight, weight.device_mesh)
    optimizer.load_state_dict(state)


def gathered_whole(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a weight whole, on the device of its shards. All processes call this function."""
    found = weight.detach()
    if dtype is not None and found.is_floating_point():
        found = found.to(dtype)
    return found.full_tensor() if isinstance(found, DTensor) else found
