"""Where the course of a training is shown. `trackers` is the table of the programs."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from luthier_api.base import ApiModel, Format, Rule
from luthier_api.spec import KeyName, ObjectName, ShortText
from luthier_api.trackers import TRACKERS, TrackerType
from luthier_api.variants import rules as type_rules

TrackerUrl = Annotated[
    str,
    Field(max_length=2048),
    Format(
        "^https?://[^/@? ]+(/[^? ]*)?$",
        "must be an address such as http://mlflow.mlops.svc:5000, without a name, a password or a token in it, which"
        " belong into the Secret of secretRef",
    ),
]


class TrackerKeys(ApiModel):
    """Which key of a Secret holds which credential of a tracker."""

    token: KeyName | None = None
    """Token, sent as a bearer (mlflow)."""
    username: KeyName | None = None
    """Name of the user, together with `password` (mlflow)."""
    password: KeyName | None = None
    """Password of the user (mlflow)."""
    api_key: KeyName | None = None
    """API key (wandb)."""
    write_token: KeyName | None = None
    """Write token of the server, or a token of the Hub that may write to the Space (trackio)."""


class TrackerSecret(ApiModel):
    """Credentials of a tracker in a Secret of the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    keys: TrackerKeys
    """Keys of the Secret, for example {username: user, password: password}."""

    def credentials(self) -> dict[str, str]:
        """Credential → key of the Secret, for `luthier_api.secrets`."""
        return {name: str(key) for name, key in self.keys.dump().items()}


class Tracker(ApiModel):
    """A program that shows the course of the training."""

    type: TrackerType
    """tensorboard: event files in the folder `tracking/tensorboard` of the workspace. They have the losses, the
    learning rate, the norms of gradients and the metrics of evaluations by step, and this spec. mlflow: a run on a
    tracking server, by its REST API. wandb: a run of Weights & Biases; without `secretRef` in the folder
    `tracking/wandb` of the workspace, for `wandb sync`; the trainer image must have its package. trackio: a run on a
    trackio server, or on a Space of the Hub.
    """
    url: TrackerUrl | None = None
    """Address of the tracking server, which the pods of `run` must reach (mlflow; trackio, for a Space
    https://OWNER-NAME.hf.space; wandb: https://api.wandb.ai when left out).
    """
    experiment: ShortText | None = None
    """Experiment (mlflow) or project (wandb, trackio) of the run, created where there is none; the namespace when
    left out.
    """
    run_name: ShortText | None = None
    """Name of the run (mlflow, wandb, trackio); that of the job when left out."""
    tags: Annotated[dict[str, ShortText] | None, Field(max_length=32)] = None
    """Tags of the run (mlflow, and as KEY:VALUE wandb), besides those that Luthier sets."""

    secret_ref: TrackerSecret | None = None
    """Credentials of the tracker: `token`, or `username` and `password` (mlflow); `apiKey` (wandb); `writeToken`
    (trackio). Only the pods of `run` get them. Without the Secret, or one of its keys, the training goes on and is not
    tracked there.
    """

    rules: ClassVar[tuple[Rule, ...]] = tuple(type_rules("tracking", TRACKERS))
