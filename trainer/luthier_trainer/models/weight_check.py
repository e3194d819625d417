"""Checks whether the weights in a folder are those that the task's model needs.

transformers initialises weights that it does not find randomly, and at most logs this. The check therefore lets it
"load" the names and shapes in the headers of the files onto the meta device, with all its rules for renamed, fused and
tied weights, and asks which weights are missing. No weight is read.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.tasks import TASKS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models import inspect, weight_files
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import copy_text_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Prefixes that DistributedDataParallel and torch.compile put before names.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
SHOWN = 3  # names in a message
FUSED = (
    "weights that are joined in memory (those of experts, or of queries, keys and values) do not fit each other, as one"
    " of them is absent or has another shape. Copy or download it again"
)
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Comparison:
    """The weights that a model does not find in the files, and those that have another shape there.

    An entry of `mismatched` is (name, shape in the files, shape in the model).
    """

    model: PreTrainedModel
    """On the meta device."""
    missing: frozenset[str]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unexpected: frozenset[str]


def fitting(
    path: Path, config: PreTrainedConfig, task: str, field: str, folder: WorkspaceFolder, named_by_adapter: bool
) -> Path:
    """Return the folder whose weights are those of the model for `task`.

    This is `path`, or a copy in the workspace without the prefixes that wrappers put before names. `named_by_adapter`:
    the result is an adapter that names the model on the Hub as its base, so that a copy cannot be used. Raises Failure
    if the weights do not fit.
    """
    files = weight_files.loaded(path, field)
    files += [path / name for name in type(config).extra_files if (path / name).is_file() and path / name not in files]
    if bare := weight_files.without_scale(files):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {path} holds no scales for {len(bare)} weights in FP8: {some(bare)}. Copy or download it again",
        )
    there = weight_files.shapes(files)
    found = compare(there, config, task, field)
    if not (lost := lacking(found, task)):
        return path
    wrapped = [name for name in there if WRAPPERS.search(name)]
    if wrapped:
        plain = compare({WRAPPERS.sub("", name): shape for name, shape in there.items()}, config, task, field)
        if not lacking(plain, task):
            return without_wrappers(path, files, wrapped, field, folder, named_by_adapter)
    raise refusal(found, lost, path, there, field)


def compare(there: Shapes, config: PreTrainedConfig, task: str, field: str) -> Comparison:
    """Return the difference between the model for `task` and weights with these names and shapes.

    Raises Failure if transformers cannot convert them into the weights of the model.
    """
    import torch
    from transformers.utils import logging

    config = copy.deepcopy(config)
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised:
        del config.quantization_config  # `there` holds the shapes of the dequantised weights
    kind = type(inspect.skeleton(config, task, field))
    weights = {name: torch.empty(shape, device="meta") for name, shape in there.items()}
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, loaded = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # converting shapes that do not fit raises exceptions of many kinds
        trouble = FUSED if "automatic conversion" in str(error) else " ".join(str(error).split())[:500]
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: its weights cannot be loaded as a {kind.__name__}: {trouble}"
        ) from error
    finally:
        logging.set_verbosity(level)
    mismatched = [(name, tuple(found), tuple(wanted)) for name, found, wanted in loaded["mismatched_keys"]]
    if quantised:  # bitsandbytes stores GPT-2's Conv1D transposed, as a Linear
        mismatched = [m for m in mismatched if sorted(m[1]) != sorted(m[2])]
    return Comparison(
        model, frozenset(loaded["missing_keys"]), tuple(sorted(mismatched)), frozenset(loaded["unexpected_keys"])
    )


def lacking(found: Comparison, task: str) -> list[str]:
    """Return the weights that would be initialised randomly and are not part of a new head.

    Each entry is a name; for a weight of another shape, both shapes follow.
    """
    labelled = TASKS[task].head
    missing = [
        name
        for name in sorted(found.missing)
        if not (labelled and in_head(found.model, name)) and not {*TASKS[task].unused} & {*name.split(".")}
    ]
    mismatched = [
        f"{name} ({shown(there)} in the files, {shown(wanted)} by config.json)"
        for name, there, wanted in found.mismatched
        if not (labelled and has_labels(found.model, name))
    ]
    return missing + mismatched


def check_head(
    path: Path, config: PreTrainedConfig, task: str, brought: Collection[str], field: str, takes_adapters: bool = True
) -> None:
    """Check that the files hold each weight of the model for `task`, or that it is in `brought`, by an adapter.

    `takes_adapters`: whether the job could name such an adapter for this model. Raises Failure if a weight would be
    initialised randomly.
    """
    found = compare(weight_files.shapes(weight_files.loaded(path, field)), config, task, field)
    lost = {*found.missing, *(name for name, _, _ in found.mismatched)} - set(brought)
    made_for = (getattr(config, "architectures", None) or [""])[0]
    heads = {info.auto_model for info in TASKS.values() if info.head} - {TASKS[task].auto_model}
    if made_for.endswith(tuple(f"For{name}" for name in heads)):
        # Heads of different tasks can have the same names and shapes, and would be loaded one for the other.
        lost |= {name for name in found.model.state_dict() if has_labels(found.model, name)} - set(brought)
    if lost:
        remedy = ", or add the adapter of such a training under spec.adapters" if takes_adapters else ""
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {path} ({made_for}) has no head for {task}: it holds no {some(sorted(lost))}. Choose a model"
            f" that was trained for it{remedy}",
        )


def in_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether a weight of a classifier belongs to its head.

    It does if it is outside of the encoder, or pools the output of the encoder.
    """
    from luthier_trainer.models.heads import whole_modules

    if "pooler" in name.split("."):  # models pretrained with masked tokens have no pooler
        return True
    if model.base_model is not model:
        encoder = next(inner for inner, module in model.named_modules() if module is model.base_model)
        return not name.startswith(f"{encoder}.")
    return any(name.startswith(f"{head}.") for head in whole_modules(model, set()))


def has_labels(model: PreTrainedModel, name: str) -> bool:
    """Return whether a weight has a row for each label, so that its shape depends on the number of labels."""
    from luthier_trainer.models.heads import head_weights

    return name in head_weights(model)


def refusal(found: Comparison, lost: list[str], path: Path, there: Shapes, field: str) -> Failure:
    """Return the Failure for weights that are missing: their names, their number, and what to do."""
    kind, needed = type(found.model).__name__, len(found.model.state_dict())
    text = f"{field}: {path} does not hold {len(lost)} of the {needed} weights of a {kind}: {some(lost)}."
    if found.unexpected:
        text += f" It holds {len(found.unexpected)} others ({some(sorted(found.unexpected))})."
    output = found.model.get_output_embeddings() if hasattr(found.model, "get_output_embeddings") else None
    head = next((name for name, module in found.model.named_modules() if module is output), None)
    if head and all(name.startswith(f"{head}.") for name in lost):
        remedy = (
            "Choose a model that was trained for this task; if its output layer is its embedding, set"
            " tie_word_embeddings: true in its config.json"
        )
    elif found.mismatched and any("vocab" in name or "embed" in name for name, _, _ in found.mismatched):
        remedy = (
            "Set vocab_size in its config.json to the rows of its embedding, or copy the files that belong together"
        )
    else:
        remedy = (
            "Copy or download it again, or choose a model whose files are whole and named as transformers names them"
        )
    return Failure(ExitCode.INVALID_SPEC, f"{text} They would start with random values. {remedy}")


def some(names: Iterable[str]) -> str:
    """Return the first names, for a message."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def shown(shape: tuple[int, ...]) -> str:
    """Return a shape for a message, such as 2 × 3."""
    return " × ".join(map(str, shape)) or "a number"


def without_wrappers(
    path: Path, files: list[Path], wrapped: list[str], field: str, folder: WorkspaceFolder, named_by_adapter: bool
) -> Path:
    """Write a copy of the model to `prepared/model`, with the weights' names without prefixes of wrappers.

    Returns the folder of the copy. Raises Failure if the result is an adapter that names the model as its base.
    """
    prefixes = " and ".join(sorted({part for name in wrapped for part in ("module.", "_orig_mod.") if part in name}))
    found = (
        f"{field}: the names of {len(wrapped)} of its weights begin with {prefixes}, which torch.compile or"
        " DistributedDataParallel put there"
    )
    if named_by_adapter:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{found}. Whoever loads an adapter with this base would get random weights. Save the model without the"
            " wrapper and name that, or use method.type: full",
        )
    target, staged = folder.prepared / "model", folder.prepared / "model.renamed"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    copy_text_files(path, staged)
    weight_files.rename(files, lambda name: WRAPPERS.sub("", name), staged)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    notice(f"{found}. The job works with a copy without them; the model itself stays as it is")
    return target
