"""The phase `prepare`: resolves and checks model and data, and plans the run.

It uses no GPU, so mistakes of the user should be found here. A finished `prepare` is not repeated; if its sources have
changed since, the job is refused. An interrupted `prepare` keeps its downloads.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.spec import DatasetSource
from luthier_api.status import Prepared
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import files
from luthier_trainer.models.hub import check_target
from luthier_trainer.runtime import notices
from luthier_trainer.tracking.table import check_packages
from luthier_trainer.workspace import provenance
from luthier_trainer.workspace.prepared import FINGERPRINT, belongs, fingerprint, read_prepared, write_prepared

LABELS_SHOWN_BYTES = 1000  # of the 4,096 bytes of a termination message; the record holds all labels


def main(run: FineTuneRun | GenerateRun) -> TerminationMessage:
    """Prepare the workspace of a job, and return the termination message.

    Raises Failure that names the path of the wrong field.
    """
    folder = WorkspaceFolder(Path(run.workspace))
    check_target(run)
    if isinstance(run, FineTuneRun):
        check_packages(run.spec)
    begin(run, folder)
    if folder.prepared_record.exists():
        record = read_prepared(run)
        refuse_changes(run, record)
        return done(planned_anew(run, record, folder))
    cache = folder.prepared / ".cache"
    # Imported here, because each of the two needs libraries that the other one does not need.
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
    """Create an empty `prepared/`, or keep the one of an interrupted `prepare` of the same job.

    Files of another version of the job are moved aside, not overwritten. They exist, for example, on a laptop after the
    manifest was edited.
    """
    if folder.prepared.exists() and not belongs(run):
        if (folder.prepared / FINGERPRINT).exists():
            set_aside(folder)
        else:
            shutil.rmtree(folder.prepared)
    folder.prepared.mkdir(parents=True, exist_ok=True)
    (folder.prepared / FINGERPRINT).write_text(fingerprint(run))


def refuse_changes(run: FineTuneRun | GenerateRun, record: PreparedRecord) -> None:
    """Raise Failure if the sources of the job have changed since `record` was written.

    Examples are files with other content, or the result of another job that has run again.
    """
    provenance.refuse_changes(record.origins)
    if isinstance(run, FineTuneRun):
        mix = run.spec.dataset.mix
        parts = [(part, f"spec.dataset.mix.sources[{i}]") for i, part in enumerate(mix.sources)] if mix else []
        sources: list[tuple[DatasetSource, str]] = [(run.spec.dataset, "spec.dataset"), *parts]
    else:
        sources = [(run.spec.inputs.dataset, "spec.inputs.dataset")] if run.spec.inputs.dataset else []
    for source, field in sources:
        for name, patterns in (("files", source.files), ("evalFiles", getattr(source, "eval_files", None))):
            files.refuse_other_files(record.origins, source, patterns or [], f"{field}.{name}")


def planned_anew(run: FineTuneRun | GenerateRun, record: PreparedRecord, folder: WorkspaceFolder) -> PreparedRecord:
    """Return `record` with the plan for the present layout of the job, and keep it. Raises Failure if it cannot run so.

    Strategy and micro-batch may change while the job is stopped. What was prepared is the same for all of them.
    """
    if not isinstance(run, FineTuneRun):
        return record
    from luthier_trainer.prepare import training

    planned = training.with_present_plan(run, record, folder)
    if planned != record:
        print(f"planned again: {planned.plan.dump()}", flush=True)
        write_prepared(run, planned)
    return planned


def set_aside(folder: WorkspaceFolder) -> Path:
    """Move the files of an earlier version of the job to `previous-<n>`, and return that folder."""
    number = next(n for n in range(1, 10_000) if not (folder.root / f"previous-{n}").exists())
    target = folder.root / f"previous-{number}"
    target.mkdir()
    for made in (folder.prepared, folder.checkpoints, folder.shards, folder.tracking, folder.result):
        if made.exists():
            made.rename(target / made.name)
    print(f"the manifest has changed: what its earlier version made is now in {target}", flush=True)
    return target


def done(record: PreparedRecord) -> TerminationMessage:
    """Return the termination message, without the labels if they would take too much of its space."""
    found = Prepared.model_validate({name: getattr(record, name) for name in Prepared.model_fields})
    labels = found.dataset.labels
    if labels and sum(len(name.encode()) + 3 for name in labels) > LABELS_SHOWN_BYTES:
        found = found.model_copy(update={"dataset": found.dataset.model_copy(update={"labels": None})})
    return TerminationMessage(
        phase="prepare", code=0, reason=ExitCode.COMPLETED.reason, prepared=found, notices=record.notices
    )
