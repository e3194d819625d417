"""What is kept of a process's output, what is hidden in it, and how the kernel's kills are counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier_trainer.supervisor.oom import oom_kills
from luthier_trainer.supervisor.process_tree import Death, Tail, with_report
from luthier_trainer.supervisor.redaction import OutputRedaction, redact

TOKEN = "hf_" + "a1B2" * 9


@dataclass(frozen=True)
class TailCase:
    name: str
    chunks: list[bytes]
    expect: str


TAILS = [
    TailCase(
        name="lines",
        chunks=[b"a\nb", b"c\n"],
        expect="a\nbc",
    ),
    TailCase(
        name="an open line",
        chunks=[b"a\nb"],
        expect="a\nb",
    ),
    TailCase(
        name="a progress bar",
        chunks=[b" 1%\r 2%\r100%\ndone\n"],
        expect="100%\ndone",
    ),
    TailCase(
        name="CRLF",
        chunks=[b"a\r\nb\r\n"],
        expect="a\nb",
    ),
    TailCase(
        name="more than are kept",
        chunks=[b"%d\n" % i for i in range(30)],
        expect="\n".join(str(i) for i in range(10, 30)),
    ),
    TailCase(
        name="not text",
        chunks=[b"\xff\xfe\n"],
        expect="\ufffd\ufffd",
    ),
    TailCase(
        name="a token across two reads",
        chunks=[TOKEN[:10].encode(), TOKEN[10:].encode() + b" ok\n"],
        expect="hf_… ok",
    ),
    TailCase(
        name="a token of another kind",
        chunks=[b"hf_oauth_" + TOKEN[3:].encode() + b" hf_jwt_eyJhbGciOiJFZERTQSJ9.e30.a-b_c ok\n"],
        expect="hf_… hf_… ok",
    ),
]


@dataclass(frozen=True)
class GpuLineCase:
    output: str
    line: str


GPU_LINES = [
    GpuLineCase(
        output="NCCL error in: x, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'\nframe",
        line="Cuda failure 2 'out of memory'",
    ),
    GpuLineCase(
        output="NCCL error: remote process exited\n[rank3] CUDA error: uncorrectable ECC error",
        line="[rank3] CUDA error: uncorrectable ECC error",
    ),
    GpuLineCase(
        output="NCCL error in: x\nNCCL error in: y",
        line="NCCL error in: x",
    ),
    GpuLineCase(
        output="UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found 1)",
        line="",
    ),
    GpuLineCase(
        output="WARNING retrying: [Errno 104] Connection reset by peer",
        line="",
    ),
    GpuLineCase(
        output="[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.1.2.3]:5",
        line="[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.1.2.3]:5",
    ),
]


@pytest.mark.parametrize("case", GPU_LINES, ids=lambda case: f"{case.output}-{case.line}")
def test_the_line_that_tells_why_a_gpu_process_ended(case: GpuLineCase) -> None:
    tail = Tail()
    tail.feed(case.output.encode() + b"\n")
    assert tail.gpu_error == case.line


@pytest.mark.parametrize("case", TAILS, ids=lambda case: case.name)
def test_the_tail_of_an_output(case: TailCase) -> None:
    tail = Tail()
    for chunk in case.chunks:
        tail.feed(chunk)
    assert tail.text() == case.expect


def test_short_words_are_not_tokens() -> None:
    assert redact("hf_home and hf_hub_offline") == "hf_home and hf_hub_offline"


OURS = "s3cret of the\x0bcompany"
HELD_BACK = [
    # chunks of an output                                       what is passed on
    (["Bearer s3cret of the\x0bcompany!\n"], "Bearer hf_…!\n"),
    ([r"b'Bearer s3cret of the\x0bcompany'"], "b'Bearer hf_…'"),
    (["a s3cr", "et of the\x0bcom", "pany b s3cret of", " us"], "a hf_… b s3cret of us"),
    (["it ends with s3cret"], "it ends with s3cret"),
]


@pytest.mark.parametrize(("chunks", "passed_on"), HELD_BACK)
def test_our_token_is_in_no_log(chunks: list[str], passed_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OURS)
    redaction = OutputRedaction()
    assert b"".join([*(redaction.feed(c.encode()) for c in chunks), redaction.rest()]).decode() == passed_on
    assert redact("".join(chunks)) == passed_on


ACCOUNT = json.dumps({"type": "service_account", "private_key": "-----BEGIN\nabcdefgh"})


@dataclass(frozen=True)
class HiddenCase:
    name: str
    variables: dict[str, str]
    output: str
    shown: str


HIDDEN_CREDENTIALS = [
    HiddenCase(
        name="a password of a tracker, as it is and in a URL",
        variables={"MLFLOW_TRACKING_PASSWORD": "pa/ss word"},
        output="pa/ss word at http://me:pa%2Fss%20word@mlflow",
        shown="[hidden] at http://me:[hidden]@mlflow",
    ),
    HiddenCase(
        name="one credential begins with another",
        variables={"MLFLOW_TRACKING_USERNAME": "somebody", "MLFLOW_TRACKING_PASSWORD": "somebody-else"},
        output="somebody-else, somebody",
        shown="[hidden], [hidden]",
    ),
    HiddenCase(
        name="the key in a JSON document",
        variables={"MLFLOW_TRACKING_TOKEN": ACCOUNT},
        output="service_account: '-----BEGIN\\nabcdefgh'",
        shown="service_account: '[hidden]'",
    ),
    HiddenCase(
        name="a variable of somebody else",
        variables={"SOMETHING": "abcdefghijk"},
        output="abcdefghijk",
        shown="abcdefghijk",
    ),
]


@pytest.mark.parametrize("case", HIDDEN_CREDENTIALS, ids=lambda case: case.name)
def test_credentials_are_in_no_log(case: HiddenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in case.variables.items():
        monkeypatch.setenv(name, value)
    redaction = OutputRedaction()
    output = [case.output[:4].encode(), case.output[4:].encode()]
    assert b"".join([*map(redaction.feed, output), redaction.rest()]).decode() == case.shown
    assert redact(case.output) == case.shown


@dataclass(frozen=True)
class CounterCase:
    name: str
    file: str
    text: str
    expect: int


COUNTERS = [
    CounterCase(
        name="v2",
        file="memory.events",
        text="low 0\noom 1\noom_kill 4\noom_group_kill 0\n",
        expect=4,
    ),
    CounterCase(
        name="v1",
        file="memory/memory.oom_control",
        text="oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        expect=2,
    ),
    CounterCase(
        name="none",
        file="other",
        text="",
        expect=0,
    ),
]


@pytest.mark.parametrize("case", COUNTERS, ids=lambda case: case.name)
def test_the_counter_of_memory_kills(case: CounterCase, tmp_path: Path) -> None:
    (tmp_path / case.file).parent.mkdir(exist_ok=True)
    (tmp_path / case.file).write_text(case.text)
    assert oom_kills(tmp_path) == case.expect


REPORT = """\
luthier_trainer.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-29_11:19:21
  host      : ftj-tune-run-node-0-0
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 11)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 11
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_11:19:21
  host      : ftj-tune-run-node-0-0
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
"""
"""As torch's agent printed it in a pod of which rank 1 was killed."""


def test_a_rank_that_the_agent_reaped_first_has_the_status_that_the_agent_reports() -> None:
    deaths = [Death(1, None, 0.0), Death(0, None, 0.1), Death(2, None, 0.2), Death(3, 81, 0.3)]
    assert [(d.rank, d.status) for d in with_report(deaths, REPORT)] == [(1, -9), (0, -15), (2, None), (3, 81)]
    assert with_report(deaths, "no report") == deaths
