"""Rows that are read while the model learns: the same rows as from a workspace, in an order that any process and any
attempt finds again.
"""

from __future__ import annotations

import gc
import gzip
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import load_dataset
from hub.access import READ_TOKEN
from hub.faults import Fault
from hub.server import Running
from prepared_workspace import losses, without_the_machine
from torch.utils.data import BatchSampler, SequentialSampler
from trainer.conftest import MakeRun
from trainer.preparing import prepared
from trainer.training.test_resume import stopped_at
from transformers import AutoTokenizer

from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.run import FineTuneRun
from luthier_api.variables import Variables
from luthier_trainer.data import remote, shards
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.table import task_of
from luthier_trainer.training import main as train
from luthier_trainer.training.resilience import Resilient
from luthier_trainer.training.stream import Block, StreamedRows, streamed_rows
from luthier_trainer.workspace.prepared import read_prepared

Row = dict[str, Any]
ROWS = 2300  # three windows
TINY_STEPS = {"maxLength": 32, "batchSize": 4, "learningRate": 1e-2, "logSteps": 1, "saveSteps": 100}


def texts(count: int = ROWS) -> list[Row]:
    """Rows of text of which some are blank, some long, and some have another language."""
    return [
        {
            "text": "" if i % 100 == 7 else f"row {i} " + "and so on " * (i % 23),
            "language": "de" if i % 10 == 3 else "en",
            "number": i,
        }
        for i in range(count)
    ]


def pairs(count: int = 1100) -> list[Row]:
    return [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(count)]


def chats(count: int = 1100) -> list[Row]:
    return [
        {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(count)
    ]


def as_jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_table(rows: list[Row]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(rows)


def write_parquet(path: Path, rows: list[Row]) -> None:
    pyarrow.parquet.write_table(as_table(rows), path, row_group_size=700)


def write_arrow(path: Path, rows: list[Row]) -> None:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, as_table(rows).schema) as writer:
        writer.write_table(as_table(rows))


WRITERS: dict[str, Callable[[Path, list[Row]], Any]] = {
    ".jsonl": lambda path, rows: path.write_bytes(as_jsonl(rows)),
    ".jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(as_jsonl(rows))),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".csv": lambda path, rows: pyarrow.csv.write_csv(as_table(rows), path),
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    ".txt": lambda path, rows: path.write_text("".join(row["text"] + "\n" for row in rows)),
}


def write(folder: Path, suffix: str, *files: list[Row]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}{suffix}" for number in range(len(files))]
    for path, rows in zip(paths, files, strict=True):
        WRITERS[suffix](path, rows)
    return [str(path) for path in paths]


@pytest.fixture
def stream(make_run: MakeRun) -> Callable[..., FineTuneRun]:
    """A run of which `dataset` and `training` are merged with those of a stream."""

    def make(
        name: str, files: list[str] | None, dataset: Row | None = None, training: Row | None = None
    ) -> FineTuneRun:
        given = {"files": files, "streaming": True, "shuffleBuffer": 0} | (dataset or {})
        return make_run(
            name,
            dataset={name: value for name, value in given.items() if value is not None},
            training=TINY_STEPS | {"maxSteps": 4} | (training or {}),
            method={"type": "lora", "rank": 4, "dropout": 0.1},
        )

    return make


def opened(run: FineTuneRun, resume: Path | None = None, rank: int = 0) -> StreamedRows:
    record = read_prepared(run)
    task = task_of(run.spec)
    processor = task.read_processor(Path(run.workspace) / "prepared" / "processor", "spec.model")
    assert record.stream is not None
    return streamed_rows(task, run.spec, record.stream, processor, Path(run.workspace) / "stream", rank, resume)


def taken(rows: StreamedRows, count: int, begin: int = 0) -> list[Row]:
    try:
        return [rows[number] for number in range(begin, begin + count)]
    finally:
        rows.close()


@dataclass(frozen=True)
class Case:
    name: str
    rows: Callable[[], list[Row]]
    dataset: Row = field(default_factory=dict)
    training: Row = field(default_factory=dict)
    suffixes: tuple[str, ...] = (".jsonl",)


CASES = [
    Case(
        name="texts",
        rows=texts,
        suffixes=(".jsonl.gz", ".json", ".csv", ".parquet", ".arrow", ".txt"),
    ),
    Case(
        name="texts of a language, of some length",
        rows=texts,
        dataset={
            "filter": {
                "columns": [{"column": "language", "values": ["en"]}],
                "minCharacters": 12,
                "maxTokens": 60,
            }
        },
    ),
    Case(
        name="completions",
        rows=pairs,
        suffixes=(".jsonl", ".parquet"),
    ),
    Case(
        name="conversations",
        rows=chats,
        dataset={"chatTemplate": {"name": "zephyr"}},
        suffixes=(".jsonl", ".parquet"),
    ),
]


@pytest.mark.parametrize(
    ("case", "suffix"),
    [
        pytest.param(case, suffix, id=f"{case.name}{suffix}", marks=[pytest.mark.slow] if number else [])
        for case in CASES
        for number, suffix in enumerate(case.suffixes)
    ],
)
def test_the_rows_are_those_of_a_workspace(
    case: Case, suffix: str, tmp_path: Path, make_run: MakeRun, stream: Callable[..., FineTuneRun]
) -> None:
    """Token by token, with their masks, in the order of the files; then they begin again."""
    files = write(tmp_path / "data", suffix, case.rows()[:1050], case.rows()[1050:])
    training = TINY_STEPS | {"maxSteps": 1} | case.training
    whole = prepared(make_run("whole", dataset={"files": files} | case.dataset, training=training))[1]["train"]
    run = stream("stream", files, case.dataset, training)
    prepare.main(run)
    expect = [*whole, *itertools.islice(whole, 5)]
    assert taken(opened(run), len(expect)) == expect
    kept = [path for path in Path(run.workspace).rglob("*") if path.suffix == ".arrow" or path.name == f"0{suffix}"]
    assert kept == []


def test_the_rows_are_those_of_datasets_and_transformers(
    tmp_path: Path, tiny_model: Path, stream: Callable[..., FineTuneRun]
) -> None:
    """Computed by their own means: `load_dataset(streaming=True)`, and the tokenizer."""
    files = write(tmp_path / "data", ".jsonl", texts(1100), texts(300))
    run = stream("stream", files)
    prepare.main(run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expect = [
        (tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id])[:32]
        for row in load_dataset("json", data_files=files, split="train", streaming=True)
        if row["text"].strip()
    ]
    assert [row["input_ids"] for row in taken(opened(run), len(expect))] == expect


SHUFFLED = {"shuffleBuffer": 300}


def test_rows_are_shuffled_in_blocks_in_each_pass_otherwise(tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    files = write(tmp_path / "data", ".jsonl", *(pairs(700)[begin : begin + 100] for begin in range(0, 700, 100)))
    plain, run = stream("plain", files), stream("stream", files, SHUFFLED)
    for each in (plain, run):
        prepare.main(each)
    whole = [row["input_ids"] for row in taken(opened(plain), 700)]
    rows = [row["input_ids"] for row in taken(opened(run), 1400)]
    number = {tuple(ids): i for i, ids in enumerate(whole)}
    numbers = [number[tuple(ids)] for ids in rows]
    first, second = numbers[:700], numbers[700:]
    assert sorted(first) == sorted(second) == list(range(700))
    assert first != second
    assert {i // 100 for i in first[:300]} != {0, 1, 2}, "files are in random order, too"
    assert len({i // 100 for i in first[:300]}) == 3, "a block has the rows of three files"
    assert len({i // 100 for i in first[:20]}) == 3


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_of_a_step(processes: int, tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    """As accelerate deals them out: the step of one process, and no row twice."""
    run = stream("stream", write(tmp_path / "data", ".jsonl", pairs(100)), SHUFFLED, {"maxSteps": 10, "batchSize": 12})
    prepare.main(run)
    alone = taken(opened(run), 120)
    found = []
    for rank in range(processes):
        rows = opened(run, rank=rank)
        batches = BatchSampler(SequentialSampler(rows), 2, False)
        found.append([[rows[i] for i in batch] for batch in BatchSamplerShard(batches, processes, rank)])
        rows.close()
    micro = 12 // (2 * processes)
    for step in range(10):
        shares = [row for batches in found for batch in batches[step * micro : (step + 1) * micro] for row in batch]
        key = lambda row: row["input_ids"]  # noqa: E731
        assert sorted(shares, key=key) == sorted(alone[step * 12 : (step + 1) * 12], key=key)


@pytest.mark.slow
def test_any_row_can_be_the_first_of_an_attempt(tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    """Also in the second pass; with the counts of what was read."""
    files = write(tmp_path / "data", ".jsonl", texts(1300), texts(90))
    for name, dataset in (("plain", {}), ("shuffled", {"shuffleBuffer": 400})):
        run = stream(name, files, dataset, {"maxSteps": 1000})
        prepare.main(run)
        rows = opened(run)
        whole = [rows[i] for i in range(2000)]
        rows.close()
        folder = tmp_path / name
        folder.mkdir()
        for begin in (1, 400, 1376, 1999):
            rows.pass_by(begin)
            rows.save(folder)
            assert taken(opened(run, folder), 2000 - begin, begin) == whole[begin:]


def test_packed_rows(tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    """Bins are made of the rows of a window."""
    run = stream("stream", write(tmp_path / "data", ".jsonl", texts(1500)), training={"packing": "isolated"})
    prepare.main(run)
    rows = opened(run)
    found = [rows[i] for i in range(2000)]
    rows.close()
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 32 for row in found)
    full = sum(len(row["input_ids"]) for row in found[:1000]) / 32_000
    assert full > 0.95


def test_little_is_in_memory(tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    """However large the files are: a block that is learnt, and those that are read ahead."""
    run = stream("stream", write(tmp_path / "data", ".parquet", pairs(12_000)), training={"maxSteps": 3000})
    prepare.main(run)
    rows = opened(run)
    for i in range(0, 12_000, 500):
        rows[i]
        sizes = [len(found.rows) for found in gc.get_objects() if isinstance(found, Block)]
        assert len(sizes) <= 3
        assert max(sizes) <= 1000
        assert rows.stream.windows_read <= i // 700 + 3, i
    rows.close()


def test_the_losses_are_those_of_rows_in_the_workspace(
    tmp_path: Path, make_run: MakeRun, stream: Callable[..., FineTuneRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the file, in which the others are not learnt."""
    files = write(tmp_path / "data", ".jsonl", texts(60))
    run = stream("stream", files, training={"maxSteps": 5, "microBatchSize": 2})
    whole = make_run("whole", **run.spec.model_dump(exclude_unset=True, by_alias=True) | {"dataset": {"files": files}})
    for each in (run, whole):
        prepare.main(each)
    streamed = train.main(run).metrics
    with monkeypatch.context() as patch:
        patch.setattr(Resilient, "_get_train_sampler", lambda self, data=None: SequentialSampler(self.train_dataset))
        kept = train.main(whole).metrics
    assert losses(run) == losses(whole)
    assert streamed is not None
    assert kept is not None
    assert (streamed["tokens"], streamed["trainLoss"]) == (kept["tokens"], kept["trainLoss"])


def test_a_run_that_is_stopped_twice_has_the_same_losses(
    tmp_path: Path, stream: Callable[..., FineTuneRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and with the same notice at its end: stopped in the first pass over the files, and in the
    third.
    """
    files = write(tmp_path / "data", ".jsonl", texts(11), texts(9))
    dataset = {"shuffleBuffer": 6, "evalFiles": write(tmp_path / "held", ".jsonl", texts(5))}
    runs = [stream(name, files, dataset, {"maxSteps": 14, "evalSteps": 5}) for name in ("whole", "stopped")]
    for run in runs:
        prepare.main(run)
    notices.forget()
    whole = train.main(runs[0]).metrics
    told = notices.given()
    assert told == [
        "spec.dataset.streaming: the stream has ended after 18 rows, fewer than training.maxSteps sees, and begins"
        " again",
        "spec.dataset.streaming: 71 rows were read, in 4 passes over the data; 7 had nothing to learn, and were left"
        " out; 15 were cut at training.maxLength",
    ]
    assert [stopped_at(runs[1], step, monkeypatch).step for step in (3, 11)] == [3, 11]
    notices.forget()
    stopped = train.main(runs[1]).metrics
    assert losses(runs[1]) == losses(runs[0])
    assert whole is not None
    assert stopped is not None
    assert without_the_machine(stopped) == without_the_machine(whole)
    assert notices.given() == told[1:]


@dataclass(frozen=True)
class Trouble:
    name: str
    change: Callable[[Path], Any]
    code: ExitCode
    message: str


TROUBLES = [
    Trouble(
        name="other content",
        change=lambda path: path.write_bytes(path.read_bytes().replace(b"row 1400", b"row 1401")),
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.files: FILE has changed since this job was prepared",
    ),
    Trouble(
        name="gone",
        change=Path.unlink,
        code=ExitCode.NOT_FOUND,
        message="spec.dataset.files: FILE, of which rows are still to be read, is gone",
    ),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_files_that_change_are_refused(trouble: Trouble, tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    files = write(tmp_path / "data", ".jsonl", texts(1500))
    run = stream("stream", files)
    prepare.main(run)
    trouble.change(Path(files[0]))
    with pytest.raises(Failure) as failure:
        train.main(run)
    assert failure.value.code is trouble.code
    assert failure.value.message.startswith(trouble.message.replace("FILE", files[0]))


def test_a_row_that_cannot_be_read_ends_the_training(tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    """After the first rows, at which `prepare` has looked."""
    files = write(tmp_path / "data", ".jsonl", texts(1500), texts(20))
    lines = Path(files[0]).read_bytes().splitlines(keepends=True)
    Path(files[0]).write_bytes(b"".join([*lines[:1200], b'{"text": 7}\n', *lines[1200:]]))
    run = stream("stream", files, training={"maxSteps": 400})
    prepare.main(run)
    rows = opened(run)
    with pytest.raises(Failure) as failure:
        taken(rows, 1600)
    assert failure.value.code is ExitCode.INVALID_DATASET
    assert failure.value.message == (
        'spec.dataset.columns.text: column "text" of 0.jsonl holds text in 500 rows and numbers in 1 rows, not text'
        " (the first of the fewest is row 1200, counted from 0 (line 1201 of 0.jsonl))"
    )


def test_rows_of_which_none_can_be_learnt(tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    """A window without any is passed over; a whole pass is not."""
    files = write(tmp_path / "data", ".jsonl", [*texts(1000), *({"text": ""} for _ in range(2500))])
    run = stream("stream", files, training={"maxSteps": 400})
    prepare.main(run)
    rows = opened(run)
    assert len(taken(rows, 995)) == 995


@pytest.fixture
def on_hub(hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    """With the dataset org/rows: two files of rows to train on, one to test with; private as org/private."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)  # read once, when `datasets` is imported
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(shards, "FIRST_PAUSE", 0.1)
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, rows in (("train-0", texts(600)), ("train-1", texts(400)), ("test-0", pairs(9))):
        text = [{"text": row.get("text", row.get("prompt"))} for row in rows]
        WRITERS[".parquet"](folder / f"{name}.parquet", text)
    hub.store.seed("dataset", "org/rows", folder)
    hub.store.seed("dataset", "org/private", folder, private=True)
    return hub


def test_rows_of_the_hub(
    tmp_path: Path,
    on_hub: Running,
    make_run: MakeRun,
    stream: Callable[..., FineTuneRun],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read by pods that are offline for the Hub's own client, in spite of a Hub that is away for a while."""
    source = {"id": "org/rows", "evalSplit": "test[:5]"}
    whole = prepared(make_run("whole", dataset=source, training=TINY_STEPS))
    run = stream("stream", None, source, {"maxSteps": 300})
    record, data = prepared(run)
    assert record.dataset.revision == whole[0].dataset.revision
    assert data["eval"].to_list() == whole[1]["eval"].to_list()
    assert list(data) == ["eval"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    on_hub.control.faults.append(Fault(status=503, count=7, path="train-1"))
    first, second = opened(run), opened(run, rank=1)
    before = len(on_hub.control.requests)
    expect = whole[1]["train"].to_list()
    assert [first[i] for i in range(990)] == [second[i] for i in range(990)] == expect
    first.close()
    second.close()
    asked = [request["path"] for request in on_hub.control.requests[before:]]
    assert len([path for path in asked if "train-1" in path]) >= 8, "the faults, and a download"
    assert list((Path(run.workspace) / "stream").rglob("*.parquet")) == []


def test_a_hub_that_stays_away_can_be_tried_again(
    on_hub: Running, stream: Callable[..., FineTuneRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an exit code of which the pod is started again, and goes on from its checkpoint."""
    run = stream("stream", None, {"id": "org/rows"})
    prepare.main(run)
    monkeypatch.setenv("LUTHIER_HUB_DEADLINE", "0.3")
    on_hub.control.faults.append(Fault(status=503))
    with pytest.raises(Failure) as failure:
        train.main(run)
    assert failure.value.code is ExitCode.HUB_UNAVAILABLE
    assert failure.value.code.retry is Retry.COUNTED


@dataclass(frozen=True)
class Refusal:
    name: str
    dataset: Row
    code: ExitCode
    message: str


REFUSALS = [
    Refusal(
        name="a private dataset",
        dataset={"id": "org/private", "files": None},
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.streaming: org/private is private. With streaming, the pods of `run` read the rows, and"
        " they get no token of the Hub",
    ),
    Refusal(
        name="no such split",
        dataset={"id": "org/rows", "files": None, "split": "validation"},
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.split: there is no split 'validation'; the splits are: test, train",
    ),
    Refusal(
        name="addresses with credentials",
        dataset={"files": ["s3://bucket/rows.jsonl"]},
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.files[0]: with streaming, the pods of `run` read the files, and have no credentials for"
        " s3://",
    ),
    Refusal(
        name="held-out rows that are learnt",
        dataset={"evalSplit": "train[:10]"},
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.evalSplit: its rows are in split train too, and would be learnt and measured on. Write"
        " split: train[10:] and evalSplit: train[:10]",
    ),
    Refusal(
        name="held-out files that are learnt",
        dataset={"evalFiles": ["FILE"]},
        code=ExitCode.INVALID_SPEC,
        message="spec.dataset.evalFiles: FILE holds the same as FILE of spec.dataset.files, and would be learnt",
    ),
    Refusal(
        name="fewer rows",
        dataset={"split": "train[1200:]"},
        code=ExitCode.INVALID_DATASET,
        message="spec.dataset.split: train[1200:] is empty: there are fewer rows",
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_what_cannot_be_streamed_is_refused_in_prepare(
    refusal: Refusal,
    tmp_path: Path,
    on_hub: Running,
    stream: Callable[..., FineTuneRun],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(Variables.TOKEN, READ_TOKEN)
    files = write(tmp_path / "data", ".jsonl", texts(1100))
    given = json.loads(json.dumps(refusal.dataset).replace("FILE", files[0]))
    with pytest.raises(Failure) as failure:
        prepare.main(stream("stream", files, given))
    assert failure.value.code is refusal.code
    assert failure.value.message.startswith(refusal.message.replace("FILE", files[0]))


def test_the_first_rows_can_be_held_out(tmp_path: Path, stream: Callable[..., FineTuneRun]) -> None:
    """In several windows and files."""
    rows = pairs(1300)
    files = write(tmp_path / "data", ".csv", rows[:1020], rows[1020:])
    run = stream("stream", files, {"split": "train[1100:]", "evalSplit": "train[:1050]"})
    record, data = prepared(run)
    plain = stream("plain", files)
    prepare.main(plain)
    expect = taken(opened(plain), 1300)
    assert data["eval"].to_list() == expect[:1050]
    assert record.dataset.eval_rows == 1050
    assert taken(opened(run), 201) == [*expect[1100:], expect[1100]]
