"""A real trackio server has one run of a training in two attempts, as its own library reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases.trackio_server import TOKEN, read, serving

from luthier_api.status import TrackedRun
from luthier_api.tracking import Tracker
from luthier_trainer.runtime import notices
from luthier_trainer.tracking.base import Report, TrackedTraining
from luthier_trainer.tracking.channel import Channel
from luthier_trainer.tracking.trackio import Trackio
from luthier_trainer.workspace import tracked_runs

SECRET = {"name": "trackio", "keys": {"writeToken": "token"}}
DOCUMENTS: dict[str, Any] = {"spec": {"task": "causal-lm", "training": {"maxSteps": 8}}, "provenance": {"luthier": "1"}}


@pytest.fixture(autouse=True)
def given_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", TOKEN)


def tracker(folder: Path, url: str, **fields: Any) -> Trackio:
    spec = Tracker.model_validate({"type": "trackio", "url": url, "secretRef": SECRET, **fields})
    return Trackio(spec, TrackedTraining("job", "lab", folder / "tracking/trackio", 0, DOCUMENTS))


def test_two_attempts_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one repeats steps of the first, as after a checkpoint, and the server has them once."""
    monkeypatch.setattr("luthier_trainer.tracking.trackio.SECONDS", 90.0)
    with serving(tmp_path) as url:
        for steps, complete in ((range(1, 5), False), (range(3, 8), True)):
            channel = Channel("trackio", tracker(tmp_path, url, experiment="my lab"))
            for step in steps:
                channel.put(Report(step, {"loss": 1 / step, "grad_norm": math.nan if step == 6 else 1.0}))
            channel.put(Report(4, {"eval_loss": 0.5}))
            channel.close(complete, 120)
        monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "wrong-write-token")
        with pytest.raises(PermissionError, match=r"127\.0\.0\.1 answered 400: A write_token is required to log"):
            tracker(tmp_path / "other", url).send(Report(1, {"loss": 1.0}))
    assert notices.given() == []

    (run,) = read(tmp_path, "my lab")
    assert run["name"] == "job"
    assert run["config"] == {"task": "causal-lm", "training": {"maxSteps": 8}, "luthier": {"luthier": "1"}}
    logs = sorted(run["logs"], key=lambda log: (log["step"], "eval_loss" in log))
    assert [(log["step"], log["loss"]) for log in logs if "loss" in log] == [(step, 1 / step) for step in range(1, 8)]
    assert [(log["step"], log["eval_loss"]) for log in logs if "eval_loss" in log] == [(4, 0.5)]
    assert [log["step"] for log in logs if math.isnan(log.get("grad_norm", 0.0))] == [6]
    page = f"{url}/?project=mylab&run_ids={run['id']}"
    assert tracked_runs.read(tmp_path / "tracking") == [TrackedRun(type="trackio", url=page, run=run["id"])]


@dataclass(frozen=True)
class Answer:
    """What a server answers, and the exception that the log shows then."""

    name: str
    status: int
    body: Any
    expect: str


ANSWERS = [
    Answer(
        name="a Space refuses the token",
        status=500,
        body={"error": "Expected the provided hf_token to provide write access to the space"},
        expect="PermissionError: trackio answered 500: Expected the provided hf_token to provide write access to the"
        " space; see spec.tracking.secretRef",
    ),
    Answer(
        name="a private Space refuses the token before trackio is asked",
        status=401,
        body="",
        expect="PermissionError: trackio answered 401; see spec.tracking.secretRef",
    ),
    Answer(
        name="the server is being upgraded",
        status=503,
        body={"error": "Writes are paused"},
        expect="OSError: trackio answered 503: Writes are paused",
    ),
    Answer(
        name="a proxy finds no server behind it",
        status=502,
        body="<html>",
        expect="OSError: trackio answered 502",
    ),
    Answer(
        name="another program is at the address",
        status=404,
        body="<html>",
        expect="OSError: trackio answered 404; is spec.tracking.url the address of a trackio server?",
    ),
    Answer(
        name="another program answers everything with its page",
        status=200,
        body="<html>",
        expect="OSError: trackio answered 200; is spec.tracking.url the address of a trackio server?",
    ),
]


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case.name)
def test_a_server_that_refuses(case: Answer, tmp_path: Path) -> None:
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        if isinstance(case.body, str):
            return httpx.Response(case.status, text=case.body)
        return httpx.Response(case.status, json=case.body)

    refused = answered_by(answer, tmp_path)
    with pytest.raises(OSError) as raised:  # noqa: PT011 - its type is part of the text that is compared
        refused.send(Report(1, {"loss": 1.0}))
    assert f"{type(raised.value).__name__}: {raised.value}" == case.expect
    (request,) = sent
    # A Space takes the token of the Hub from the one, a server of one's own its write token from the other.
    assert (request.headers["Authorization"], request.headers["X-Trackio-Write-Token"]) == (f"Bearer {TOKEN}", TOKEN)
    assert tracked_runs.read(tmp_path / "tracking") == []


def answered_by(answer: Callable[[httpx.Request], httpx.Response], folder: Path) -> Trackio:
    """A tracker whose server is `answer`."""
    found = tracker(folder, "http://trackio")
    found._client = httpx.Client(base_url="http://trackio", transport=httpx.MockTransport(answer))
    return found
