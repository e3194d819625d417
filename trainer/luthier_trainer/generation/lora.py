"""LoRA files for images: read whole or refused, checked against the model's shapes, and added to its weights in fp32.

diffusers 0.42.1 reads such files too, but loses what is said of single modules: a kohya file's own alpha for each
module (the names in its `alpha_pattern` match none), LyCORIS' `dora_scale`, and keys of modules that it does not know.
Here each tensor of a file is used, or the file is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from luthier_api.exitcodes import ExitCode
from luthier_trainer.generation.loranames import Names, split
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

Tensors = dict[str, torch.Tensor]
"""Role (`loranames.ROLES`) → tensor."""

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration, keys such as `unet.lora_alpha`
TRAINED_FOR = ("ss_base_model_version", "modelspec.architecture")  # kohya's and Stability's note of the base model
# Of PEFT's ways to begin, these leave the base weights alone; pissa, olora, corda and loftq train against others.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")
# Tensors that a module must have, and those that it may have beside them. Any other set is refused.
WHOLE: tuple[tuple[set[str], set[str]], ...] = (
    ({"up", "down"}, {"mid", "alpha", "up_bias"}),
    ({"up", "down", "magnitude"}, {"mid", "alpha"}),
    ({"up", "down", "dora_scale"}, {"mid", "alpha"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"alpha", "dora_scale"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}, {"alpha", "dora_scale"}),
    *(
        (first | second, {"alpha", "dora_scale"})
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    ),
    ({"diff"}, {"diff_bias"}),
    ({"diff_bias"}, set()),
)
SHOWN = 4  # names in a message


@dataclass(frozen=True)
class Change:
    """What a file does to one module: `module` of the pipeline's model `part`.

    What the module gains is by its authors' formulas:

        LoRA   alpha / rank * up @ down              for a convolution: the composition of `down`, `mid` and `up`
        LoHa   alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)
        LoKr   alpha / rank * kron(w1, w2)           without alpha / rank where neither factor has a rank
        diff   the difference itself
        DoRA   magnitude * V / |V| - W               V: W plus one of the first three
    """

    part: str
    module: str
    tensors: Tensors
    scale: float
    """alpha / rank."""

    def weight(self, base: torch.Tensor) -> torch.Tensor | None:
        """What is added to `base`, the module's weight in fp32, by an adapter of weight 1; None when only the bias
        changes.
        """
        t = {name: tensor.float() for name, tensor in self.tensors.items()}
        if set(t) == {"diff_bias"}:
            return None
        added = self.scale * product(t).reshape(base.shape)
        if "magnitude" in t:
            return _decomposed(base + added, t["magnitude"], outputs=True) - base
        if "dora_scale" in t:
            return _decomposed(base + added, t["dora_scale"], outputs=t["dora_scale"].shape[0] == base.shape[0]) - base
        return added

    def bias(self) -> torch.Tensor | None:
        """What is added to the module's bias."""
        if "up_bias" in self.tensors:
            return self.scale * self.tensors["up_bias"].float()
        return self.tensors["diff_bias"].float() if "diff_bias" in self.tensors else None


def product(t: Tensors) -> torch.Tensor:
    """What the factors of a module make, before its scale: outputs × inputs, or outputs × (inputs · height · width)
    where they are flat.
    """
    if "diff" in t:
        return t["diff"]
    if "up" in t:
        up, down = t["up"].flatten(1), t["down"].flatten(1)
        # 1×1, then k×k among the ranks, then 1×1.
        return torch.einsum("oa,abhw,bi->oihw", up, t["mid"], down) if "mid" in t else up @ down
    if "hada_w1_a" in t:
        return _pair(t, "hada_w1", "hada_t1") * _pair(t, "hada_w2", "hada_t2")
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else _pair(t, "lokr_w2", "lokr_t2")
    return torch.kron(first[(..., *[None] * (second.dim() - 2))].contiguous(), second.contiguous())


def _pair(t: Tensors, name: str, core: str) -> torch.Tensor:
    """a @ b, or with a Tucker core (rank × rank × height × width) their composition."""
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return torch.einsum("abhw,ao,bi->oihw", t[core], a, b) if core in t else a @ b.flatten(1)


def _decomposed(directions: torch.Tensor, magnitudes: torch.Tensor, outputs: bool) -> torch.Tensor:
    """DoRA: vectors of these directions and magnitudes, one for each output, or for each input."""
    kept = 0 if outputs else 1
    others = [d for d in range(directions.dim()) if d != kept]
    lengths = torch.linalg.vector_norm(directions, dim=others, keepdim=True)
    return directions * (magnitudes.reshape(lengths.shape) / lengths.clamp_min(torch.finfo(directions.dtype).eps))


def rank(t: Tensors) -> int | None:
    """The rank of a module's factors; None when they have none."""
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in t:
            return int(t[name].shape[0])
    return None


def shape(t: Tensors) -> tuple[int, ...]:
    """Shape of the weight that the tensors are made for; trailing dimensions of 1 count for nothing. Raises ValueError
    when they do not fit together.
    """
    made = product({name: torch.empty_like(tensor, device="meta", dtype=torch.float32) for name, tensor in t.items()})
    if "down" in t and "mid" not in t and t["down"].dim() > 2:  # flat: the inputs of all pixels in a row
        return (*made.shape[:1], *t["down"].shape[1:])
    return tuple(made.shape)


def read(path: Path, names: Names, field: str) -> list[Change]:
    """All changes in a file. `names` may be of models on the meta device. Raises Failure unless every tensor of the
    file is used.
    """
    tensors, metadata = _load(path, field)
    found: dict[tuple[str, str], Tensors] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        parted = split(key)
        place = names.find(parted[0]) if parted else None
        if parted is None or place is None:
            unknown.append(key)
            continue
        if parted[1] in found.setdefault(place, {}):
            raise _invalid(field, path, f"has {key} and another tensor for the same module, {_spoken(place)}")
        if not torch.isfinite(tensor.float()).all():
            raise _invalid(
                field,
                path,
                f"{key} holds values that are not finite (NaN or infinite). Training it went wrong; use an earlier"
                " checkpoint",
            )
        found[place][parted[1]] = tensor
    if unknown:
        raise _invalid(
            field,
            path,
            f"has {len(tensors)} tensors, of which {len(unknown)} belong to no module of this model, or are of a kind"
            f" that is not known: {_shown(unknown)}. Adding the others alone would be another"
            f" adapter.{_trained_for(metadata)} LoRA, LoHa, LoKr and DoRA for Stable Diffusion XL can be used",
        )
    if not found:
        raise _invalid(field, path, "holds no tensors")
    configs = _configs(path, metadata, field)
    return [_change(place, t, configs.get(place[0], {}), names, metadata, field, path) for place, t in found.items()]


def _load(path: Path, field: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises Failure if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise _invalid(field, path, f"is damaged or no safetensors file ({error}). Download or copy it again") from None


def _configs(path: Path, metadata: Mapping[str, str], field: str) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of each part of the pipeline, where the file brings one. Raises Failure for one that cannot
    be applied.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        whole = dict(json.loads(metadata.get(METADATA, "{}")))
    except (ValueError, TypeError) as error:
        raise _invalid(field, path, f"has unreadable {METADATA} in its header: {error}") from None
    for key, value in whole.items():
        part, _, name = key.partition(".")
        found.setdefault(part, {})[name] = value
    beside = path.with_name(ADAPTER_CONFIG)
    if path.name.startswith("adapter_model") and beside.is_file():
        found["unet"] = json.loads(beside.read_text())
    for config in found.values():
        for pattern in config.get("alpha_pattern") or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise _invalid(field, path, f"has an alpha_pattern that is no pattern, {pattern!r}: {error}") from None
        if (way := config.get("init_lora_weights")) not in PLAIN_BEGINNINGS:
            raise _invalid(
                field,
                path,
                f"was begun by {way}, which changes the weights of the model too. Convert it to a plain LoRA first",
            )
    return found


def _change(
    place: tuple[str, str],
    t: Tensors,
    config: Mapping[str, Any],
    names: Names,
    metadata: Mapping[str, str],
    field: str,
    path: Path,
) -> Change:
    """The change of one module, checked. Raises Failure."""
    part, name = place
    if not any(needed <= set(t) <= needed | extra for needed, extra in WHOLE):
        raise _invalid(
            field, path, f"has {' and '.join(sorted(t))} for {_spoken(place)}, which is no whole LoRA, LoHa or LoKr"
        )
    module = names.parts[part].get_submodule(name)
    if set(t) != {"diff_bias"}:
        try:
            made = shape(t)
        except (RuntimeError, KeyError) as error:
            raise _invalid(field, path, f"the tensors for {_spoken(place)} do not fit together: {error}") from None
        if math.prod(made) != module.weight.numel() or not _same(
            made, tuple(module.weight.shape), flat=not {"up", "diff"} & set(t)
        ):
            raise _invalid(
                field,
                path,
                f"does not fit the model: {_spoken(place)} is {_by(module.weight.shape)} there, and {_by(made)} in the"
                f" file.{_trained_for(metadata)}",
            )
    _check_vectors(place, t, module, field, path)
    if config.get("use_dora") and not {"magnitude", "dora_scale"} & set(t):
        raise _invalid(field, path, f"is a DoRA by its configuration, and has no magnitude for {_spoken(place)}")
    return Change(part, name, t, _scale(place, t, config, field, path))


def _check_vectors(place: tuple[str, str], t: Tensors, module: Any, field: str, path: Path) -> None:
    """Magnitudes and biases against the module's outputs (or inputs). Raises Failure."""
    outputs = module.weight.shape[0]
    if "dora_scale" in t:
        given, inputs = tuple(t["dora_scale"].shape), int(module.weight.shape[1])
        count = outputs if given[:1] == (outputs,) else inputs
        if (
            given[:1] not in ((outputs,), (1,))
            or math.prod(given) != count
            or (count == inputs != outputs and given[1:2] != (inputs,))
        ):
            raise _invalid(
                field,
                path,
                f"dora_scale of {_spoken(place)} is {_by(given)}, and the module {_by(module.weight.shape)}",
            )
    if "magnitude" in t and t["magnitude"].numel() != outputs:
        raise _invalid(
            field,
            path,
            f"the magnitude of {_spoken(place)} has {t['magnitude'].numel()} numbers, and the module {outputs} outputs",
        )
    for name in {"up_bias", "diff_bias"} & set(t):
        bias = getattr(module, "bias", None)
        if bias is None or t[name].numel() != bias.numel():
            raise _invalid(
                field,
                path,
                f"has a bias of {t[name].numel()} numbers for {_spoken(place)}, which has"
                f" {bias.numel() if bias is not None else 'none'}",
            )


def _scale(place: tuple[str, str], t: Tensors, config: Mapping[str, Any], field: str, path: Path) -> float:
    """alpha / rank of one module: of the file's own alpha, or of PEFT's configuration, or 1. Raises Failure if they
    contradict each other.
    """
    dimension = rank(t) or config.get("r")  # PEFT's LoKr divides by its rank also where no factor has one
    if dimension is None:
        return 1.0
    written = float(t["alpha"]) if "alpha" in t and t["alpha"].numel() == 1 else None
    if "alpha" in t and not written:
        raise _invalid(field, path, f"alpha of {_spoken(place)} is not one number other than 0")
    configured = _pattern(config.get("alpha_pattern"), place[1], config.get("lora_alpha", config.get("alpha")))
    if configured is None:
        return (written or dimension) / dimension
    if written is not None and written != configured:
        raise _invalid(
            field,
            path,
            f"says two things of alpha for {_spoken(place)}: {written:g} in a tensor and {configured:g} in its"
            " configuration",
        )
    return float(configured) / (math.sqrt(dimension) if config.get("use_rslora") else dimension)


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """PEFT's look-up: the first pattern that matches the end of the module's name."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def fuse(parts: Mapping[str, Any], adapters: Sequence[tuple[Sequence[Change], float]]) -> None:
    """Add adapters, each as often as its weight says, to models in fp32.

    Each is taken by itself over the model's own weights, so their order does not matter, also for DoRA, which depends
    on what it is added to.
    """
    places: dict[tuple[str, str], list[tuple[Change, float]]] = {}
    for changes, times in adapters:
        for change in changes:
            places.setdefault((change.part, change.module), []).append((change, times))
    with torch.no_grad():
        for (part, name), found in places.items():
            module = parts[part].get_submodule(name)
            own = module.weight.detach().clone()
            for change, times in found:
                if (weight := change.weight(own)) is not None:
                    module.weight += times * weight
                if (bias := change.bias()) is not None:
                    module.bias += times * bias.reshape(module.bias.shape)


def _same(made: tuple[int, ...], wanted: tuple[int, ...], flat: bool) -> bool:
    """`flat`: whether inputs and pixels may be in one dimension."""
    if flat and len(made) == 2:
        return made[0] == wanted[0]
    return _trimmed(made) == _trimmed(wanted)


def _trimmed(size: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of 1 behind the first two: a linear layer and a 1×1 convolution are one thing."""
    while len(size) > 2 and size[-1] == 1:
        size = size[:-1]
    return size


def _trained_for(metadata: Mapping[str, str]) -> str:
    base = next((metadata[key] for key in TRAINED_FOR if metadata.get(key)), None)
    return f" The file says that it was trained for {base}." if base else ""


def _spoken(place: tuple[str, str]) -> str:
    return ".".join(place)


def _by(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _invalid(field: str, path: Path, what: str) -> Failure:
    return Failure(ExitCode.INVALID_SPEC, f"{field}: {path.name} {what}")
