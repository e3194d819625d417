"""Weights & Biases: a run of its server, or a folder in the workspace that `wandb sync` uploads later.

Through its own library, because its server has no other documented interface. Not through the integration of
transformers, which would read its settings from the environment and call it in the thread that trains.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from luthier_api.tracking import Tracker as TrackerSpec
from luthier_trainer.tracking.base import Report, TrackedTraining, credentials
from luthier_trainer.workspace import tracked_runs
from luthier_trainer.workspace.manifest import replace_file

SERVER = "https://api.wandb.ai"
INIT_SECONDS = 20.0  # after which a server counts as away
KEPT_FILE = "run.json"
ID_CHARACTERS = 16


class WeightsAndBiases:
    """Logs each report to one run, whose id the workspace keeps for later attempts."""

    def __init__(self, spec: TrackerSpec, training: TrackedTraining) -> None:
        self._spec, self._training = spec, training
        self._run: Any = None
        self._id = uuid4().hex[:ID_CHARACTERS]
        """Of the run; of an earlier attempt, if there was one."""
        self._sent = -1
        """The last step that this or an earlier attempt has sent. W&B drops steps that are not newer."""

    def send(self, report: Report) -> None:
        if self._run is None:
            self._run = self._opened()
        if report.step > self._sent:
            self._run.log(report.values, step=report.step)
            self._sent = report.step
            self._keep()

    def close(self, complete: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if complete else 1)

    def _opened(self) -> Any:
        import wandb

        given, training = credentials(self._spec), self._training
        training.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            mode="online" if given else "offline",
            api_key=given.get("apiKey"),
            base_url=self._spec.url or SERVER,
            init_timeout=INIT_SECONDS,
            root_dir=str(training.folder),
            # Everything that it collects without being asked, about this process, its code and its machine.
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        file = training.folder / KEPT_FILE
        if file.exists():
            kept = json.loads(file.read_text())
            self._id, self._sent = kept["id"], kept["sent"]
        self._keep()
        run = wandb.init(
            project=self._spec.experiment or training.namespace,
            name=self._spec.run_name or training.name,
            id=self._id,
            resume="allow",
            config=training.documents["spec"] | {"luthier": training.documents["provenance"]},
            tags=[f"{key}:{value}" for key, value in (self._spec.tags or {}).items()],
            settings=settings,
        )
        folder = f"{training.folder.parent.name}/{training.folder.name}/wandb"
        tracked_runs.keep(training.folder, "wandb", run=self._id if given else folder, url=run.url if given else None)
        return run

    def _keep(self) -> None:
        replace_file(self._training.folder / KEPT_FILE, json.dumps({"id": self._id, "sent": self._sent}).encode())
