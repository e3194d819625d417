"""The callback that hands what a trainer logs to the trackers of a job."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier_api.run import FineTuneRun, PreparedRecord, installed_version
from luthier_api.trackers import TRACKERS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.tracking.base import Report, TrackedTraining
from luthier_trainer.tracking.channel import Channel
from luthier_trainer.tracking.table import implementation


class Tracking(TrainerCallback):
    """Passes each report to all channels. Leaving its context closes them, also if the training fails."""

    def __init__(self, channels: list[Channel]) -> None:
        self._channels = channels
        self.complete = False
        """Whether the training has come to its end. Its last line sets it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        values = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        for channel in self._channels:
            channel.put(Report(state.global_step, values))

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels:
            channel.close(self.complete)


def tracking(run: FineTuneRun, prepared: PreparedRecord, resumed_step: int | None) -> Tracking:
    """Return the callback for the trackers of `run`. `resumed_step`: of the checkpoint that this attempt starts from.

    Only the first process tracks: what it logs is over all of them.
    """
    folder = WorkspaceFolder(Path(run.workspace)).tracking
    made_of = {
        "model": prepared.model.dump(),
        "dataset": prepared.dataset.model_copy(update={"labels": None}).dump(),
        "plan": prepared.plan.dump(),
        "luthier": installed_version(),
    }
    channels = []
    for spec in run.spec.tracking:
        training = TrackedTraining(
            name=run.name,
            namespace=run.namespace,
            folder=folder / spec.type,
            next_step=0 if resumed_step is None else resumed_step + 1,
            documents={"spec": run.spec.dump(), "provenance": made_of},
        )
        channels.append(Channel(TRACKERS[spec.type].title, implementation(spec.type)(spec, training)))
        print(f"spec.tracking: {TRACKERS[spec.type].title}: {spec.url or training.folder}", flush=True)
    return Tracking(channels)
