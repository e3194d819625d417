"""Provides a located source as one folder that `from_pretrained` loads.

The folder is used as it is, downloaded, or merged from another job's adapter and its base model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models import sources
from luthier_trainer.models.adapters import check_mergeable
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG, copy_text_files


def whole_model(
    located: sources.Located, run: FineTuneRun | GenerateRun, folder: WorkspaceFolder, job: str | None, name: str
) -> Path:
    """Return the folder of the model, which is downloaded or merged into `prepared/NAME` if necessary.

    `job`: the FineTuneJob whose result it is, if it is one.

    Raises Failure if the source is damaged, or is an adapter whose base model is not known here.
    """
    target = folder.prepared / name
    path = located.fetch(target)
    shutil.rmtree(target / ".cache", ignore_errors=True)  # metadata that the download leaves
    if not sources.is_adapter(path):
        if sources.holds_adapter(path):
            notice(sources.LEFT_OUT.format(field=located.field, what=located.resolved.source))
        return path
    if job is None:
        base = json.loads((path / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
        hint = " and give it under spec.adapters" if isinstance(run, GenerateRun) else ""
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{located.field}: that is an adapter, not a model; set its base model {base!r} there{hint}",
        )
    check_mergeable(json.loads((path / ADAPTER_CONFIG).read_text()), located.field)
    base_path = sources.base_of(job, run, located.field)
    # Written beside the target and then renamed, so that an interrupted merge leaves no incomplete model.
    staged = folder.prepared / f"{name}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)

    from luthier_trainer.models.merge import merge, outputs_of

    merge(base_path, path, staged, outputs_of(path), located.field)
    copy_text_files(path, staged)  # the tokenizer and its templates
    staged.rename(target)
    return target
