"""Reads LoRA files for images, checks them against the shapes of the model, and adds them to its weights in fp32.

diffusers 0.42.1 can read such files too, but it drops settings of single modules: the alpha of each module in a kohya
file (the names in its `alpha_pattern` match no module), the `dora_scale` of LyCORIS, and the keys of modules that it
does not know; of FLUX the alpha of the last layer. Here either every tensor of a file is used, or the file is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models.loranames import Names, Place, split
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

Tensors = dict[str, torch.Tensor]
"""Role (`loranames.ROLES`) → tensor."""

# Entry of the header with PEFT's configuration in files of diffusers. Its keys are, for example, `unet.lora_alpha`.
METADATA = "lora_adapter_metadata"
# Entries of the header that name the base model in files of kohya and of Stability.
TRAINED_FOR = ("ss_base_model_version", "modelspec.architecture")
# Initialisations of PEFT that do not change the base weights. With pissa, olora, corda and loftq, the adapter was
# trained on changed base weights.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")
# Sets of tensors that a module must have, each with the tensors that may be added. Any other set is refused.
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
    """The change that a file makes to one of its modules.

    The update of the weight W follows the formulas of each method's authors:

        LoRA   alpha / rank * up @ down              for a convolution: the composition of `down`, `mid` and `up`
        LoHa   alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)
        LoKr   alpha / rank * kron(w1, w2)           without alpha / rank where neither factor has a rank
        diff   the difference itself
        DoRA   magnitude * V / |V| - W               V: W plus one of the first three updates
    """

    place: Place
    tensors: Tensors
    scale: float
    """alpha / rank."""

    def weight(self, base: torch.Tensor) -> torch.Tensor | None:
        """Return the update of `base`, the weight of the module in fp32, for an adapter of weight 1, in the same shape.

        The result is None if only the bias changes.
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
        """Return the update of the module's bias, [outputs], in fp32; None if the bias does not change."""
        if "up_bias" in self.tensors:
            return self.scale * self.tensors["up_bias"].float()
        return self.tensors["diff_bias"].float() if "diff_bias" in self.tensors else None


def product(t: Tensors) -> torch.Tensor:
    """Return the product of a module's factors, without its scale, in the shape that the factors give.

    Usually that is [outputs, inputs]. For flat factors of convolutions it is [outputs, inputs · height · width].
    """
    if "diff" in t:
        return t["diff"]
    if "up" in t:
        up, down = t["up"].flatten(1), t["down"].flatten(1)
        # Composition of three convolutions: `down` is 1×1, `mid` is k×k from rank to rank, and `up` is 1×1.
        return torch.einsum("oa,abhw,bi->oihw", up, t["mid"], down) if "mid" in t else up @ down
    if "hada_w1_a" in t:
        return _pair(t, "hada_w1", "hada_t1") * _pair(t, "hada_w2", "hada_t2")
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else _pair(t, "lokr_w2", "lokr_t2")
    return torch.kron(first[(..., *[None] * (second.dim() - 2))].contiguous(), second.contiguous())


def _pair(t: Tensors, name: str, core: str) -> torch.Tensor:
    """Return a @ b, or with a Tucker core [rank, rank, height, width] the composition of the three."""
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return torch.einsum("abhw,ao,bi->oihw", t[core], a, b) if core in t else a @ b.flatten(1)


def _decomposed(directions: torch.Tensor, magnitudes: torch.Tensor, outputs: bool) -> torch.Tensor:
    """Return `directions` scaled to `magnitudes`, one magnitude for each output, or for each input (DoRA)."""
    kept = 0 if outputs else 1
    others = [d for d in range(directions.dim()) if d != kept]
    lengths = torch.linalg.vector_norm(directions, dim=others, keepdim=True)
    return directions * (magnitudes.reshape(lengths.shape) / lengths.clamp_min(torch.finfo(directions.dtype).eps))


def rank(t: Tensors) -> int | None:
    """Return the rank of a module's factors; None if they have none."""
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in t:
            return int(t[name].shape[0])
    return None


def shape(t: Tensors) -> tuple[int, ...]:
    """Return the shape of the weight that the tensors were made for, apart from trailing dimensions of 1.

    Raises RuntimeError or KeyError if the tensors do not fit together.
    """
    made = product({name: torch.empty_like(tensor, device="meta", dtype=torch.float32) for name, tensor in t.items()})
    # Flat factors of a convolution: the product has inputs and pixels in one dimension.
    if "down" in t and "mid" not in t and t["down"].dim() > 2:
        return (*made.shape[:1], *t["down"].shape[1:])
    return tuple(made.shape)


def read(path: Path, names: Names, field: str) -> list[Change]:
    """Return all changes in a file. `names` may be those of models on the meta device.

    `field`: the field of the spec that names the file. Raises Failure unless every tensor of the file can be used.
    """
    tensors, metadata = _load(path, field)
    found: dict[Place, Tensors] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        parted = split(key)
        place = names.find(parted[0]) if parted else None
        if parted is None or place is None:
            unknown.append(key)
            continue
        if parted[1] in found.setdefault(place, {}):
            raise _invalid(field, path, f"has {key} and another tensor for the same module, {place}")
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
            f" adapter.{_trained_for(metadata)} {_usable(names)}",
        )
    if not found:
        raise _invalid(field, path, "holds no tensors")
    _check_names(found, field, path)
    configs = _configs(path, metadata, field, names.denoiser)
    return [_change(place, t, configs.get(place.part, {}), names, metadata, field, path) for place, t in found.items()]


def _check_names(places: Iterable[Place], field: str, path: Path) -> None:
    """Check that no module is named in two ways. Raises Failure if one is: which of the two counts is not known."""
    by_module: dict[tuple[str, str], Place] = {}
    for place in places:
        for module in place.modules:
            other = by_module.setdefault((place.part, module), place)
            if other is not place:
                raise _invalid(
                    field,
                    path,
                    f"has tensors for {place} and for {other}, so that a module has two changes. Remove one of them",
                )


def _load(path: Path, field: str) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises Failure if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise _invalid(field, path, f"is damaged or no safetensors file ({error}). Download or copy it again") from None


def _configs(path: Path, metadata: Mapping[str, str], field: str, denoiser: str) -> dict[str, dict[str, Any]]:
    """Return PEFT's configuration for each part of the pipeline, if the file has one.

    `denoiser`: the part to which a configuration beside the file belongs. Raises Failure if a configuration cannot be
    applied.
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
        found[denoiser] = json.loads(beside.read_text())
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
    place: Place,
    t: Tensors,
    config: Mapping[str, Any],
    names: Names,
    metadata: Mapping[str, str],
    field: str,
    path: Path,
) -> Change:
    """Check the tensors of one module and return its change. Raises Failure if they do not fit the module."""
    if not any(needed <= set(t) <= needed | extra for needed, extra in WHOLE):
        raise _invalid(field, path, f"has {' and '.join(sorted(t))} for {place}, which is no whole LoRA, LoHa or LoKr")
    weight, bias = (_joined(place, names.parts[place.part], kind) for kind in ("weight", "bias"))
    assert weight is not None, "only modules with a weight have names"
    if set(t) != {"diff_bias"}:
        try:
            made = shape(t)
        except (RuntimeError, KeyError) as error:
            raise _invalid(field, path, f"the tensors for {place} do not fit together: {error}") from None
        if math.prod(made) != weight.numel() or not _same(made, tuple(weight.shape), flat=not {"up", "diff"} & set(t)):
            raise _invalid(
                field,
                path,
                f"does not fit the model: {place} is {_by(weight.shape)} there, and {_by(made)} in the"
                f" file.{_trained_for(metadata)}",
            )
    _check_vectors(place, t, weight, bias, field, path)
    if config.get("use_dora") and not {"magnitude", "dora_scale"} & set(t):
        raise _invalid(field, path, f"is a DoRA by its configuration, and has no magnitude for {place}")
    return Change(place, t, _scale(place, t, config, field, path))


def _joined(place: Place, model: Any, kind: str) -> torch.Tensor | None:
    """Return the weight or the bias (`kind`) of a place; None if one of its modules has none."""
    there = {module: getattr(model.get_submodule(module), kind, None) for module in place.modules}
    found = {module: tensor for module, tensor in there.items() if tensor is not None}
    return place.joined(found) if len(found) == len(there) else None


def _check_vectors(
    place: Place, t: Tensors, weight: torch.Tensor, bias: torch.Tensor | None, field: str, path: Path
) -> None:
    """Check the sizes of magnitudes and biases against the module. Raises Failure if they differ."""
    outputs = weight.shape[0]
    if "dora_scale" in t:
        given, inputs = tuple(t["dora_scale"].shape), int(weight.shape[1])
        count = outputs if given[:1] == (outputs,) else inputs
        if (
            given[:1] not in ((outputs,), (1,))
            or math.prod(given) != count
            or (count == inputs != outputs and given[1:2] != (inputs,))
        ):
            raise _invalid(
                field,
                path,
                f"dora_scale of {place} is {_by(given)}, and the module {_by(weight.shape)}",
            )
    if "magnitude" in t and t["magnitude"].numel() != outputs:
        raise _invalid(
            field,
            path,
            f"the magnitude of {place} has {t['magnitude'].numel()} numbers, and the module {outputs} outputs",
        )
    for name in {"up_bias", "diff_bias"} & set(t):
        if bias is None or t[name].numel() != bias.numel():
            raise _invalid(
                field,
                path,
                f"has a bias of {t[name].numel()} numbers for {place}, which has"
                f" {bias.numel() if bias is not None else 'none'}",
            )


def _scale(place: Place, t: Tensors, config: Mapping[str, Any], field: str, path: Path) -> float:
    """Return alpha / rank of one module, with alpha from the file's own tensor or from PEFT's configuration, else 1.

    Raises Failure if the two contradict each other.
    """
    dimension = rank(t) or config.get("r")  # PEFT's LoKr divides by the configured rank even if no factor has a rank
    if dimension is None:
        return 1.0
    written = float(t["alpha"]) if "alpha" in t and t["alpha"].numel() == 1 else None
    if "alpha" in t and not written:
        raise _invalid(field, path, f"alpha of {place} is not one number other than 0")
    alpha = config.get("lora_alpha", config.get("alpha"))
    alphas = {_pattern(config.get("alpha_pattern"), module, alpha) for module in place.modules}
    if len(alphas) > 1:
        raise _invalid(field, path, f"its configuration has several alphas for {place}, which is one in the file")
    configured = alphas.pop()
    if configured is None:
        return (written or dimension) / dimension
    if written is not None and written != configured:
        raise _invalid(
            field,
            path,
            f"says two things of alpha for {place}: {written:g} in a tensor and {configured:g} in its configuration",
        )
    return float(configured) / (math.sqrt(dimension) if config.get("use_rslora") else dimension)


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's name, as PEFT looks it up."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def fuse(parts: Mapping[str, Any], adapters: Sequence[tuple[Sequence[Change], float]]) -> None:
    """Add adapters, each multiplied by its weight, to the weights of models in fp32, in place.

    `parts`: component → model. The update of each adapter is computed from the model's original weights. Therefore the
    order of adapters does not matter, even for DoRA, whose update depends on the weights that it is added to.
    """
    with torch.no_grad():
        for found in _sharing(adapters):
            part = parts[found[0][0].place.part]
            modules = {name: part.get_submodule(name) for change, _ in found for name in change.place.modules}
            weights = {name: module.weight for name, module in modules.items()}
            biases = {
                name: module.bias for name, module in modules.items() if getattr(module, "bias", None) is not None
            }
            own = {name: weight.detach().clone() for name, weight in weights.items()}
            for change, times in found:
                if (weight := change.weight(change.place.joined(own))) is not None:
                    change.place.add(weights, times * weight)
                if (bias := change.bias()) is not None:
                    change.place.add(biases, times * bias.flatten())


def _sharing(adapters: Sequence[tuple[Sequence[Change], float]]) -> list[list[tuple[Change, float]]]:
    """Return the changes of all adapters in groups that share modules, each with the weight of its adapter.

    Adapters can name query, key and value as one module or as three.
    """
    groups: dict[tuple[str, str], list[tuple[Change, float]]] = {}
    for changes, times in adapters:
        for change in changes:
            there = {id(group): group for key in _keys(change) if (group := groups.get(key)) is not None}
            joined = [*(entry for group in there.values() for entry in group), (change, times)]
            groups |= {key: joined for member, _ in joined for key in _keys(member)}
    return list({id(group): group for group in groups.values()}.values())


def _keys(change: Change) -> list[tuple[str, str]]:
    return [(change.place.part, module) for module in change.place.modules]


def _same(made: tuple[int, ...], wanted: tuple[int, ...], flat: bool) -> bool:
    """Return whether two shapes are equal. `flat`: whether `made` may have inputs and pixels in one dimension."""
    if flat and len(made) == 2:
        return made[0] == wanted[0]
    return _trimmed(made) == _trimmed(wanted)


def _trimmed(size: tuple[int, ...]) -> tuple[int, ...]:
    """Return `size` without trailing dimensions of 1: a linear layer and a 1×1 convolution count as the same."""
    while len(size) > 2 and size[-1] == 1:
        size = size[:-1]
    return size


def _usable(names: Names) -> str:
    """Return which adapters the model can have."""
    if names.denoiser == "unet":
        return "LoRA, LoHa, LoKr and DoRA for Stable Diffusion XL can be used"
    if names.has_authors_names:
        return (
            "For FLUX adapters of the transformer and of CLIP can be used, with the names of diffusers, of kohya"
            " (lora_unet_double_blocks_0_img_attn_qkv, lora_te1_) and of ComfyUI (diffusion_model.double_blocks)"
        )
    return (
        "For Stable Diffusion 3 adapters with diffusers' names of the modules (transformer.transformer_blocks"
        ".0.attn.to_q) can be used; convert the file, for example by diffusers' load_lora_weights and save_lora_weights"
    )


def _trained_for(metadata: Mapping[str, str]) -> str:
    base = next((metadata[key] for key in TRAINED_FOR if metadata.get(key)), None)
    return f" The file says that it was trained for {base}." if base else ""


def _by(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _invalid(field: str, path: Path, what: str) -> Failure:
    return Failure(ExitCode.INVALID_SPEC, f"{field}: {path.name} {what}")
