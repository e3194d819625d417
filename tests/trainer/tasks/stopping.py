"""A training that is stopped in the middle, as pods are."""

from __future__ import annotations

from typing import Any

import pytest

from luthier_api.run import FineTuneRun
from luthier_api.termination import TerminationMessage
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat


def stopped_at(run: FineTuneRun, step: int, monkeypatch: pytest.MonkeyPatch) -> TerminationMessage:
    """Train until the stop flag appears, as the supervisor would set it, in the middle of `step`."""

    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                (run_dir() / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        message = train.main(run)
    (run_dir() / "stop").unlink()
    return message
