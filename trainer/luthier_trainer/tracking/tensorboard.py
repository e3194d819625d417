"""TensorBoard: event files in the workspace, written by the integration of transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

from luthier_api.tracking import Tracker as TrackerSpec
from luthier_trainer.tracking.base import Report, TrackedTraining
from luthier_trainer.workspace import tracked_runs

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter
    from transformers.integrations import TensorBoardCallback


class TensorBoard:
    """Writes an event file for each attempt, all in one folder, which TensorBoard shows as one run."""

    def __init__(self, spec: TrackerSpec, training: TrackedTraining) -> None:
        self._training = training
        self._writer: SummaryWriter | None = None
        self._callback: TensorBoardCallback | None = None

    def send(self, report: Report) -> None:
        if self._callback is None:
            self._callback = self._opened()
        state = SimpleNamespace(is_world_process_zero=True, global_step=report.step)
        self._callback.on_log(None, state, None, logs=report.values)

    def close(self, complete: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _opened(self) -> TensorBoardCallback:
        from tensorboardX import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        first = self._training.next_step
        # TensorBoard leaves out what earlier files have from `purge_step` on. The suffix keeps two attempts that begin
        # in the same second on the same host from writing to one file.
        folder = self._training.folder
        tracked_runs.keep(folder, "tensorboard", run=f"{folder.parent.name}/{folder.name}/{self._training.name}")
        writer = SummaryWriter(str(folder / self._training.name), purge_step=first, filename_suffix=f".from-{first}")
        for title, data in self._training.documents.items():
            text = json.dumps(data, indent=1)
            writer.add_text(title, f"```json\n{text}\n```", max(0, first - 1))
        self._writer = writer
        return TensorBoardCallback(writer)
