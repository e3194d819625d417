"""Chooses the file of the adapter for a text-to-image job.

LoRA adapters for images are published without a configuration, and often several of them in one repository.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import MODEL_CONFIG, PIPELINE_CONFIG

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers gives to the file
KOHYA_WEIGHTS = "kohya_lora.safetensors"  # the same adapter in another form, in the result of a FineTuneJob
WHOLE_MODEL = (PIPELINE_CONFIG, MODEL_CONFIG)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHOWN = 8  # file names in a message


def choose(names: Sequence[str], asked: str | None, field: str, where: str) -> str:
    """Return the adapter's file among `names`, the files of the repository or folder `where`.

    `asked` is the file that the user chose, if any. `field` is the path of the adapter in the spec. If there are
    several safetensors files, the one with diffusers' own name is used, with a notice. Raises Failure if there is none,
    if there are several and none has that name, or if the files are a whole model.
    """
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if asked is not None:
        return _asked(found, asked, field, where)
    if {LORA_WEIGHTS, KOHYA_WEIGHTS} <= {*found}:
        found.remove(KOHYA_WEIGHTS)
    if whole := next((name for name in WHOLE_MODEL if name in names), None):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {where} is a whole model, not an adapter (it has {whole}); use it as spec.model, or name the"
            f" adapter's file in {field}.file",
        )
    if len(found) == 1:
        return found[0]
    if LORA_WEIGHTS in found:
        others = [name for name in found if name != LORA_WEIGHTS]
        notice(
            f"{field}: {where} has {len(found)} .safetensors files; {LORA_WEIGHTS} is used, and not {_shown(others)}."
            f" Set {field}.file for another"
        )
        return LORA_WEIGHTS
    if found:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {where} has {len(found)} .safetensors files ({_shown(found)}); choose one with {field}.file",
        )
    if pickle := next((name for name in names if name.endswith(PICKLES)), None):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {where} has its weights only as {pickle}. Files that can run code are not opened; convert it to"
            " safetensors, or choose another",
        )
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: {where} has no weights (*.safetensors); it has: {_shown(sorted(names)) or 'nothing'}",
    )


def _asked(found: list[str], asked: str, field: str, where: str) -> str:
    """Return the file that `spec.adapters[].file` names. Raises Failure if it is not there."""
    if asked in found:
        return asked
    near = difflib.get_close_matches(asked, found, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Failure(
        ExitCode.NOT_FOUND,
        f"{field}.file: {where} has no file {asked!r} (it has: {_shown(found) or 'no .safetensors'}).{hint}",
    )


def _shown(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
