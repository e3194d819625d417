"""Names that modules had in earlier versions of transformers, as the present ones.

ViT's `query`, for example, is `q_proj` since version 5. transformers reads files with old names by such a table.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"[\w.-]+")
"""A name, or the end of one. What else a field holds is a regular expression."""


def present_names(model: torch.nn.Module, name: str, field: str) -> list[str]:
    """Return the present names of the modules that `name` means: itself, unless it is an old name.

    Gives notice of names that have changed. `field`: of the spec.
    """
    if not NAME.fullmatch(name):
        return [name]
    there = [f".{known}" for known, _ in [*model.named_modules(), *model.named_parameters()]]
    if any(known.endswith(f".{name}") for known in there):
        return [name]
    found = [new for new in _candidates(name, _renamings(model)) if any(known.endswith(f".{new}") for known in there)]
    if not found:
        return [name]
    notice(
        f"{field}: {name} is called {' and '.join(found)} in {model.config.model_type} since transformers 5; these"
        " were taken"
    )
    return found


def _candidates(name: str, renamings: list[tuple[str, str]]) -> list[str]:
    """Return what may be the present names of `name`, which may begin within an old one: layer.3 in encoder.layer."""
    begun = [name]
    for old, new in renamings:
        parts = old.split(".")
        tails = [".".join(parts[i:]) for i in range(len(parts))]
        begun += [f"{new}{name[len(tail) :]}" for tail in tails if f"{name}.".startswith(f"{tail}.")]
    found = []
    for candidate in begun:
        dotted = f".{candidate}."
        for old, new in renamings:
            dotted = dotted.replace(f".{old}.", f".{new}.")
        found.append(dotted.strip("."))
    return list(dict.fromkeys(found))


def _renamings(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Return (old, new) parts of names of modules, as transformers renames them when it reads files."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return []
    found = []
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(transform, WeightRenaming):
            old, new = (
                patterns[0].replace("\\.", ".").strip(".")
                for patterns in (transform.source_patterns, transform.target_patterns)
            )
            if NAME.fullmatch(old) and NAME.fullmatch(new):
                found.append((old, new))
    return found
