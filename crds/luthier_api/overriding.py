"""Types that are drawn from the blocks of settings: what a row may override of them, and what a sweep lists for them.

Each field of a block is optional in them, and has no default. So a field that is added to a block can at once be
overridden and swept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from luthier_api.base import ApiModel
from luthier_api.marks import For

MOST_VALUES = 64  # of a field in a sweep


@dataclass(frozen=True)
class WholeJob:
    """A mark: the field of a block of settings is the same for all rows."""


WHOLE_JOB = WholeJob()
Blocks = Mapping[str, type[ApiModel]]
"""Name of a block of settings in a spec → its type."""


def overriding(blocks: Blocks, name: str, text: str) -> type[ApiModel]:
    """The type of what a row overrides of each block. `text`: its description."""
    return _of_blocks(blocks, name, text, ApiModel, "What the row overrides of `spec.{}`.", lambda kind: kind)


def sweeping(blocks: Blocks, name: str, base: type[ApiModel]) -> type[ApiModel]:
    """`base`, with the lists of values that a sweep gives the fields of each block."""
    text = "Values of fields of `spec.{}`, instead of those of the rows."
    return _of_blocks(blocks, name, base.__doc__ or "", base, text, _list_of)


def _list_of(kind: Any) -> Any:
    return Annotated[(list[kind], Field(min_length=1, max_length=MOST_VALUES))]


def _of_blocks(
    blocks: Blocks, name: str, text: str, base: type[ApiModel], of_block: str, of: Callable[[Any], Any]
) -> type[ApiModel]:
    fields: dict[str, Any] = {}
    for block, model in blocks.items():
        kind: Any = _of_block(model, f"{name}{model.__name__}", of_block.format(block), of)
        fields[block] = (Annotated[kind | None, For("task")], Field(default=None, description=of_block.format(block)))
    return _drawn(name, text, base, fields, texts_of=base)


def _of_block(block: type[ApiModel], name: str, text: str, of: Callable[[Any], Any]) -> type[ApiModel]:
    fields: dict[str, Any] = {}
    for field, info in block.model_fields.items():
        if WHOLE_JOB not in info.metadata:
            marks = [mark for mark in info.metadata if isinstance(mark, For)]
            kind: Any = of(_bounded(info)) | None
            fields[field] = (Annotated[(kind, *marks)] if marks else kind, None)
    return _drawn(name, text, ApiModel, fields, texts_of=block)


def _drawn(
    name: str, text: str, base: type[ApiModel], fields: dict[str, Any], texts_of: type[ApiModel]
) -> type[ApiModel]:
    model = create_model(name, __base__=base, __doc__=text, __module__=__name__, **fields)
    model.texts_of = texts_of
    return model


def _bounded(info: FieldInfo) -> Any:
    """The type of a field with its bounds."""
    bounds = [mark for mark in info.metadata if not isinstance(mark, For)]
    return Annotated[(info.annotation, *bounds)] if bounds else info.annotation
