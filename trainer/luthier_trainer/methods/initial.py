"""Adapters whose beginning is computed from the weights that they adapt (`method.initLoraWeights`).

With pissa and olora they begin as a part of the weights. PEFT takes this part out of the base model: its adapter works
on that base alone, an adapter that is switched off leaves another model, and what is taken out is rounded to 16 bits.
Here the base stays as it is, and each layer computes `W x + s (B A - B0 A0) x`, where s is the adapter's scale, and A0
and B0 are what A and B were in the beginning: the same in exact numbers. The result is an ordinary adapter of twice the
rank. PEFT computes A0 and B0. With loftq they begin as what the quantised weights lack (`methods.loftq`), and are not
subtracted. A0 and B0 are kept in the workspace, because another machine may round a singular vector otherwise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import load_file, save_file

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_trainer.methods import loftq
from luthier_trainer.methods.lora import begins_by_weights
from luthier_trainer.models.adapters import PREFIX
from luthier_trainer.models.quantised_base import LOFTQ
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat_before_first_step
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.manifest import differences, read_manifest, write_manifest
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    from luthier_trainer.distributed.ranks import Ranks

ADAPTER = "default"  # PEFT's name of the only adapter
FILE = "initial.safetensors"
RESULT = "adapter_model.safetensors"  # as PEFT saves it


class Subtracting(LoraVariant):
    """A layer whose adapter counts by what it has become beside its beginning."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """`first`: A in the beginning, [rank, inputs]. `second`: B, [outputs, rank]."""
        # Neither weights nor buffers of the module: nothing saves, divides or sends them.
        self.first, self.second = first, second

    def forward(self, module: Any, active_adapter: str, x: torch.Tensor, result: Any, **_: Any) -> torch.Tensor:
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if self.first.device != x.device or self.first.dtype != lora_a.weight.dtype:
            self.first, self.second = (t.to(x.device, lora_a.weight.dtype) for t in (self.first, self.second))
        learnt = lora_b(lora_a(module.lora_dropout[active_adapter](x)))
        begun = torch.nn.functional.linear(torch.nn.functional.linear(x, self.first), self.second)
        return result + (learnt - begun) * module.scaling[active_adapter]


@dataclass(frozen=True)
class Initial:
    """What the adapters were in the beginning."""

    values: Mapping[str, torch.Tensor]
    """Name of a module + .A or .B → the matrix."""
    scales: Mapping[str, float]
    """Name of a module → the scale of its adapter."""

    def write_ordinary(self, folder: Path) -> None:
        """Convert the adapter in `folder`, as PEFT has saved it, to an ordinary one for the original base.

        Its matrices are [A; A0] and s [B, -B0], with a scale of 1 for each module.
        """
        file = folder / RESULT
        weights = load_file(file)
        for name, scale in self.scales.items():
            first, second = (f"{name}.lora_{part}.weight" for part in "AB")
            begun = [self.values[f"{name}.{part}"].to(weights[first].dtype).float() for part in "AB"]
            weights[first] = torch.cat([weights[first].float(), begun[0]])
            weights[second] = (scale * torch.cat([weights[second].float(), -begun[1]], dim=1)).contiguous()
        save_file(weights, file, metadata={"format": "pt"})
        path = folder / ADAPTER_CONFIG
        config = json.loads(path.read_text())
        ranks = {pattern: 2 * rank for pattern, rank in (config.get("rank_pattern") or {}).items()}
        rank = 2 * config["r"]
        changes = {"r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks}
        path.write_text(json.dumps(config | changes | {"use_rslora": False}, indent=2, sort_keys=True))


def begin(
    model: Any, method: Method, device: torch.device, folder: Path, ranks: Ranks, identity: str, base: Path
) -> Initial | None:
    """Let the adapters of `model` begin as the method says, and return what is subtracted from them; None for nothing.

    `device`: where singular vectors are computed. `folder`: where they are kept for other attempts of the run with this
    `identity`. `base`: the folder of the base model. All processes call this function. Raises Failure if loftq finds
    none of its weights quantised, or others than in the files.
    """
    if not begins_by_weights(method):
        return None
    kind = str(method.init_lora_weights)
    layers = dict(quantised(model) if kind == LOFTQ else adapted(model))
    if kind == LOFTQ and not layers:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{loftq.FIELD}: none of the modules with an adapter is quantised; use gaussian, or other targetModules",
        )
    source = loftq.Source(base, model.get_base_model().base_model_prefix) if kind == LOFTQ else None

    def compute(name: str, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if source is None:
            return beginning(layer, kind, device)
        own = name.removeprefix(PREFIX)
        return loftq.beginning(layer, source.weight(own).to(device), ADAPTER, own)

    ranks.decide(lambda: _keep(layers, compute, folder, identity))
    # Copies, because what `load_file` returns would change with the file.
    values = {name: value.clone() for name, value in load_file(folder / FILE).items()}
    for name, layer in layers.items():
        first, second = values[f"{name}.A"], values[f"{name}.B"]
        with torch.no_grad():
            layer.lora_A[ADAPTER].weight.copy_(first)
            layer.lora_B[ADAPTER].weight.copy_(second)
        if kind != LOFTQ:
            layer.lora_variant[ADAPTER] = Subtracting(first, second)
    if kind == LOFTQ:
        return None
    return Initial(values, {name: layer.scaling[ADAPTER] for name, layer in layers.items()})


def adapted(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of the layers with an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def quantised(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of the layers with an adapter beside weights of 4 bits."""
    from bitsandbytes.nn import Linear4bit  # only jobs with quantised weights import it

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), Linear4bit):
            yield name, module


def _keep(
    layers: Mapping[str, Any],
    compute: Callable[[str, Any], tuple[torch.Tensor, torch.Tensor]],
    folder: Path,
    identity: str,
) -> None:
    """Write what the adapters begin as to `folder`, unless it is there."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.get("identity") == identity:
        wrong = differences(folder, manifest["files"], beat_before_first_step)
        if not wrong:
            return
        notice(
            f"spec.method.initLoraWeights: {folder / FILE} is broken ({wrong[0]}). It is computed anew, and may differ"
            " in its rounding"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        values[f"{name}.A"], values[f"{name}.B"] = compute(name, layer)
        beat_before_first_step()
    save_file(values, folder / FILE)
    write_manifest(folder, identity=identity)


def beginning(layer: Any, kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B as PEFT begins them for a layer, on the CPU in fp32. Its base weight stays as it is."""
    weight = layer.get_base_layer().weight
    before = weight.data
    weights = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    places = [(w.device, w.dtype) for w in weights]
    try:
        weight.data = before.to(device, copy=True)  # PEFT changes it, in place or not
        with torch.no_grad():
            if kind == "olora":
                layer.olora_init(ADAPTER)
            else:
                layer.pissa_init(ADAPTER, kind)
        first, second = (w.data.float().cpu().clone(memory_format=torch.contiguous_format) for w in weights)
    finally:
        weight.data = before
        for adapter, place in zip(weights, places, strict=True):
            adapter.data = adapter.data.to(*place)
    return first, second
