"""What is kept of a process's output, what is hidden in it, and how the kernel's kills are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier_trainer.supervisor.oom import oom_kills
from luthier_trainer.supervisor.process_tree import Tail
from luthier_trainer.supervisor.redaction import Veil, redact

TOKEN = "hf_" + "a1B2" * 9
TAILS = [
    ("lines", [b"a\nb", b"c\n"], "a\nbc"),
    ("an open line", [b"a\nb"], "a\nb"),
    ("a progress bar", [b" 1%\r 2%\r100%\ndone\n"], "100%\ndone"),
    ("CRLF", [b"a\r\nb\r\n"], "a\nb"),
    ("more than are kept", [b"%d\n" % i for i in range(30)], "\n".join(str(i) for i in range(10, 30))),
    ("not text", [b"\xff\xfe\n"], "\ufffd\ufffd"),
    ("a token across two reads", [TOKEN[:10].encode(), TOKEN[10:].encode() + b" ok\n"], "hf_… ok"),
    (
        "a token of another kind",
        [b"hf_oauth_" + TOKEN[3:].encode() + b" hf_jwt_eyJhbGciOiJFZERTQSJ9.e30.a-b_c ok\n"],
        "hf_… hf_… ok",
    ),
]


GPU_LINES = [
    # output                                                                                   the line that tells why
    (
        "NCCL error in: x, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'\nframe",
        "Cuda failure 2 'out of memory'",
    ),
    (
        "NCCL error: remote process exited\n[rank3] CUDA error: uncorrectable ECC error",
        "[rank3] CUDA error: uncorrectable ECC error",
    ),
    ("NCCL error in: x\nNCCL error in: y", "NCCL error in: x"),
    ("UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found 1)", ""),
    ("WARNING retrying: [Errno 104] Connection reset by peer", ""),
    (
        "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.1.2.3]:5",
        "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.1.2.3]:5",
    ),
]


@pytest.mark.parametrize(("output", "line"), GPU_LINES)
def test_the_line_that_tells_why_a_gpu_process_ended(output: str, line: str) -> None:
    tail = Tail()
    tail.feed(output.encode() + b"\n")
    assert tail.gpu_error == line


@pytest.mark.parametrize(("name", "chunks", "expect"), TAILS, ids=[c[0] for c in TAILS])
def test_the_tail_of_an_output(name: str, chunks: list[bytes], expect: str) -> None:
    tail = Tail()
    for chunk in chunks:
        tail.feed(chunk)
    assert tail.text() == expect


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
    veil = Veil()
    assert b"".join([*(veil.feed(c.encode()) for c in chunks), veil.rest()]).decode() == passed_on
    assert redact("".join(chunks)) == passed_on


COUNTERS = [
    ("v2", "memory.events", "low 0\noom 1\noom_kill 4\noom_group_kill 0\n", 4),
    ("v1", "memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", 2),
    ("none", "other", "", 0),
]


@pytest.mark.parametrize(("name", "file", "text", "expect"), COUNTERS, ids=[c[0] for c in COUNTERS])
def test_the_counter_of_memory_kills(name: str, file: str, text: str, expect: int, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert oom_kills(tmp_path) == expect
