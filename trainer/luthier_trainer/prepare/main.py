"""The phase that resolves and checks model and data, and plans. It holds no GPU, so that mistakes of the user should be
found here.

A finished `prepare` is not repeated; if its sources have changed since, the job is refused. An interrupted one keeps
its downloads.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.status import Prepared
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import files
from luthier_trainer.models.hub import check_target
from luthier_trainer.runtime import notices
from luthier_trainer.workspace import provenance
from luthier_trainer.workspace.prepared import FINGERPRINT, belongs, fingerprint, read_prepared, write_prepared

LABELS_SHOWN_BYTES = 1000  # of the 4,096 that a termination message has; all of them are in the record


def main(run: FineTuneRun | GenerateRun) -> TerminationMessage:
    """Prepare the workspace of one job. Raises Failure with the path of the field that does not fit."""
    folder = WorkspaceFolder(Path(run.workspace))
    check_target(run)
    begin(run, folder)
    if folder.prepared_record.exists():
        record = read_prepared(run)
        refuse_changes(run, record)
        return done(record)
    cache = folder.prepared / ".cache"
    # Imported here, because each needs libraries that the other does not.
    if isinstance(run, FineTuneRun):
        from luthier_trainer.prepare import training

        record = training.prepare(run, folder, cache)
    else:
        from luthier_trainer.prepare import generation

        record = generation.prepare(run, folder, cache)
    shutil.rmtree(cache, ignore_errors=True)
    record = record.model_copy(update={"notices": notices.given()})
    write_prepared(run, record)
    return done(record)


def begin(run: FineTuneRun | GenerateRun, folder: WorkspaceFolder) -> None:
    """Make an empty `prepared/`, or keep the one that an interrupted `prepare` of the same job left.

    What belongs to another version of the job (on a laptop, after an edit of the manifest) is set aside, never
    overwritten.
    """
    if folder.prepared.exists() and not belongs(run):
        if (folder.prepared / FINGERPRINT).exists():
            set_aside(folder)
        else:
            shutil.rmtree(folder.prepared)
    folder.prepared.mkdir(parents=True, exist_ok=True)
    (folder.prepared / FINGERPRINT).write_text(fingerprint(run))


def refuse_changes(run: FineTuneRun | GenerateRun, record: PreparedRecord) -> None:
    """Raise Failure when what the job was made of is no longer what its manifest names: files with other content,
    results made anew.
    """
    provenance.refuse_changes(record.origins)
    source, field = (
        (run.spec.dataset, "spec.dataset")
        if isinstance(run, FineTuneRun)
        else (run.spec.inputs.dataset, "spec.inputs.dataset")
    )
    if source is not None:
        for name, patterns in (("files", source.files), ("evalFiles", getattr(source, "eval_files", None))):
            files.refuse_other_files(record.origins, source, patterns or [], f"{field}.{name}")


def set_aside(folder: WorkspaceFolder) -> Path:
    """Move what the job's earlier version made to `previous-<n>`."""
    number = next(n for n in range(1, 10_000) if not (folder.root / f"previous-{n}").exists())
    target = folder.root / f"previous-{number}"
    target.mkdir()
    for made in (folder.prepared, folder.checkpoints, folder.shards, folder.result):
        if made.exists():
            made.rename(target / made.name)
    print(f"the manifest has changed: what its earlier version made is now in {target}", flush=True)
    return target


def done(record: PreparedRecord) -> TerminationMessage:
    found = Prepared.model_validate({name: getattr(record, name) for name in Prepared.model_fields})
    labels = found.dataset.labels
    if labels and sum(len(name.encode()) + 3 for name in labels) > LABELS_SHOWN_BYTES:
        found = found.model_copy(update={"dataset": found.dataset.model_copy(update={"labels": None})})
    return TerminationMessage(
        phase="prepare", code=0, reason=ExitCode.COMPLETED.reason, prepared=found, notices=record.notices
    )
