"""`prepare` of a FineTuneJob over real files, tokenizers and models: what it makes, and how each mistake is told."""

from __future__ import annotations

import errno
import gzip
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from trainer.architectures import save_tiny
from trainer.preparing import prepared
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer.models.new_tokenizer import train_tokenizer
from luthier_trainer.prepare.main import LABELS_SHOWN_BYTES, main
from luthier_trainer.runtime.classify import classify
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.causal_lm import CausalLM
from luthier_trainer.workspace import space
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., FineTuneRun]
CLASSIFY = {"task": "text-classification"}
ROWS = [
    {"text": f"The {w} is a word.", "label": w[0]}
    for w in ("apple", "bear", "axe", "bench", "arc", "bow", "ant", "bell")
]


def write(folder: Path, name: str, content: object = None) -> str:
    """A file of the format that its name says; `content` replaces the eight rows."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: Any = ROWS if content is None else content
    if isinstance(rows, str | bytes):
        path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
        return str(path)
    columns = {k: [r.get(k) for r in rows] for k in rows[0]}
    match Path(path.name).suffixes:
        case [".csv"]:
            Dataset.from_dict(columns).to_csv(path, index=False)
        case [".tsv"] | [".TSV"]:
            Dataset.from_dict(columns).to_csv(path, index=False, sep="\t")
        case [".tsv", ".gz"]:
            path.write_bytes(gzip.compress(Path(write(folder, "unpacked.tsv", rows)).read_bytes()))
        case [".json"]:
            path.write_text(json.dumps(rows))
        case [".jsonl"]:
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
        case [".parquet"]:
            Dataset.from_dict(columns).to_parquet(path)
        case [".txt"]:
            path.write_text("".join(r["text"] + "\n\n" for r in rows))
    return str(path)


FORMATS = [
    "rows.csv",
    "rows.tsv",
    "rows.TSV",
    "rows.tsv.gz",
    "rows.json",
    "rows.jsonl",
    "rows.jsonl.gz",
    "rows.parquet",
    "rows.txt",
    "run[1]*/rows.jsonl",
]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, make_run: MakeRun, tmp_path: Path) -> None:
    record, data = prepared(make_run(dataset={"files": [write(tmp_path, name)]}))
    tokenizer = AutoTokenizer.from_pretrained(Path(record.model_path))
    assert [tokenizer.decode(ids) for ids in data["train"]["input_ids"]] == [
        r["text"] + tokenizer.eos_token for r in ROWS
    ]
    assert (record.dataset.rows, record.dataset.tokens) == (8, sum(map(len, data["train"]["input_ids"])))


def test_captions_of_an_image_folder_are_text(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(len(ROWS)):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{i}.png", "text": r["text"]}) + "\n" for i, r in enumerate(ROWS))
    )
    record, _ = prepared(make_run(dataset={"files": [str(folder)], "format": "imagefolder"}))
    assert record.dataset.rows == 8


@pytest.mark.parametrize(("free", "encoded"), [(1.4, [500]), (1.8, [500, 12_000])])
def test_a_sample_of_the_rows_tells_whether_all_of_them_fit(
    free: float, encoded: list[int], make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written twice, and refused if not even four fifths of that fit. `free`: in sizes of the encoded rows."""
    rows = [{"text": "word " * (1 + i % 40)} for i in range(12_000)]
    run = make_run(dataset={"files": [write(tmp_path, "rows.jsonl", rows)]})
    seen: list[int] = []
    encode = CausalLM.encode

    def counted(task: CausalLM, rows: Any, *args: Any) -> Any:
        seen.append(len(rows.data))
        data = encode(task, rows, *args)
        if len(data) == len(rows.data) == 12_000:
            raise Failure(ExitCode.TRAINING_ERROR, "all rows were encoded")
        return data

    record, _ = prepared(make_run("before", dataset={"files": [str(tmp_path / "rows.jsonl")]}))
    size = sum(file.stat().st_size for file in Path(record.dataset_path).rglob("*.arrow"))
    monkeypatch.setattr(CausalLM, "encode", counted)
    monkeypatch.setattr(space, "volume", lambda folder: (round(free * size), 10 * size))
    message = "12,000 rows, encoded, need about" if len(encoded) == 1 else "all rows were encoded"
    with pytest.raises(Failure, match=message):
        main(run)
    assert seen == encoded


def test_globs_columns_and_slices(make_run: MakeRun, tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path, f"part-{i}.jsonl", [{"body": r["text"]} for r in ROWS])
    dataset = {
        "files": [str(tmp_path / "part-*.jsonl")],
        "columns": {"text": "body"},
        "split": "train[:75%]",
        "evalSplit": "train[75%:]",
    }
    record, data = prepared(make_run(dataset=dataset))
    assert (record.dataset.rows, record.dataset.eval_rows) == (12, 4)
    twice = make_run(
        "twice",
        dataset=dataset
        | {"files": [*dataset["files"], str(tmp_path / "part-0.jsonl"), str(tmp_path / "x/../part-1.jsonl")]},
    )
    (tmp_path / "x").mkdir()
    assert prepared(twice)[0].dataset == record.dataset.model_copy(
        update={"source": ", ".join(twice.spec.dataset.files or [])}
    )
    assert data["train"].column_names == ["input_ids", "length"]


def test_csv_cells_stay_what_they_are(make_run: MakeRun, tmp_path: Path) -> None:
    """pandas would read NA and null as nothing."""
    path = write(tmp_path, "x.csv", "text,label\nNA,a\nnull,b\nNone,a\n")
    record, _ = prepared(make_run(task="text-classification", dataset={"files": [path]}))
    assert record.dataset.rows == 3


def test_packing_loses_no_token_and_keeps_line_breaks(make_run: MakeRun, tmp_path: Path) -> None:
    texts = ["def f():\n    return 1\n\n\nclass A:\n    pass\n", "two\nlines"]
    files = [write(tmp_path, f"{i}.txt", text) for i, text in enumerate(texts)]
    record, data = prepared(
        make_run(dataset={"files": files}, training={"maxLength": 8, "batchSize": 4, "packing": "concatenate"})
    )
    tokenizer = AutoTokenizer.from_pretrained(record.model_path)
    assert "".join(tokenizer.decode(ids) for ids in data["train"]["input_ids"]) == "".join(
        t + tokenizer.eos_token for t in texts
    )
    assert set(data["train"]["length"][:-1]) == {8}


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl"])
def test_packing_goes_on_from_one_batch_to_the_next(name: str, make_run: MakeRun, tmp_path: Path) -> None:
    """More rows than `datasets` hands over at once."""
    rows = [{"text": f"line {i}"} for i in range(2500)]
    path = write(tmp_path, name, "\n".join(r["text"] for r in rows) if name.endswith(".txt") else rows)
    record, data = prepared(
        make_run(dataset={"files": [path]}, training={"maxLength": 64, "batchSize": 4, "packing": "concatenate"})
    )
    tokenizer = AutoTokenizer.from_pretrained(record.model_path)
    joint, end = ("\n", tokenizer.eos_token) if name.endswith(".txt") else (tokenizer.eos_token, tokenizer.eos_token)
    assert (
        "".join(tokenizer.decode(ids) for ids in data["train"]["input_ids"])
        == joint.join(r["text"] for r in rows) + end
    )


def test_packed_rows_are_planned_as_bins(make_run: MakeRun, tmp_path: Path) -> None:
    """Rows, steps and tokens of the plan are those of the bins, and no token of a row is lost."""
    path = write(tmp_path, "x.jsonl", [{"text": f"line {i} " * (i % 7 + 1)} for i in range(100)])
    dataset = {"files": [path], "evalFraction": 0.25}
    training = {"maxLength": 64, "batchSize": 4, "epochs": 2}
    record, data = prepared(make_run("packed", dataset=dataset, training=training | {"packing": "isolated"}))
    _, rows = prepared(make_run("rows", dataset=dataset, training=training | {"maxLength": 256}))
    assert record.dataset.rows == len(data["train"]) < len(rows["train"])
    assert record.plan.steps == 2 * math.ceil(len(data["train"]) / 4)
    for split in ("train", "eval"):
        found, expect = (sorted(token for ids in given[split]["input_ids"] for token in ids) for given in (data, rows))
        assert found == expect
        assert max(data[split]["length"]) <= 64
    assert record.dataset.tokens == sum(rows["train"]["length"])


def test_a_model_that_sees_across_packed_rows_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    save_tiny("bloom", tmp_path / "bloom")
    with pytest.raises(Failure, match=r"^spec\.training\.packing: isolated: bloom does not keep the rows apart"):
        prepared(
            make_run(
                model={"path": str(tmp_path / "bloom")},
                training={"maxLength": 64, "batchSize": 4, "packing": "isolated"},
            )
        )


def test_packed_blocks_are_held_out(make_run: MakeRun, corpus_file: Path) -> None:
    run = make_run(
        dataset={"files": [str(corpus_file)], "evalFraction": 0.1},
        training={"maxLength": 64, "batchSize": 4, "packing": "concatenate"},
    )
    record, data = prepared(run)
    total = record.dataset.rows + record.dataset.eval_rows
    assert record.dataset.eval_rows == round(total * 0.1) > 5
    assert not {tuple(r) for r in data["train"]["input_ids"]} & {tuple(r) for r in data["eval"]["input_ids"]}


def test_rows_are_held_out_by_the_seed(make_run: MakeRun, corpus_rows: Path) -> None:
    held = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        dataset = {"files": [str(corpus_rows)], "evalFraction": 0.25}
        _, data = prepared(make_run(name, dataset=dataset, training={"maxLength": 64, "batchSize": 4, "seed": seed}))
        held.append(data["eval"]["input_ids"][:])
        assert len(data["eval"]) == 50
    assert held[0] == held[1] != held[2]


@dataclass(frozen=True)
class ClassCase:
    name: str
    labels: list[Any]
    names: list[str]
    ids: list[int]


CLASSES = [
    ClassCase(
        name="names",
        labels=["b", "a", "b"],
        names=["a", "b"],
        ids=[1, 0, 1],
    ),
    ClassCase(
        name="numbers",
        labels=[10, 2, 10],
        names=["2", "10"],
        ids=[1, 0, 1],
    ),
    ClassCase(
        name="truth",
        labels=[True, False, True],
        names=["false", "true"],
        ids=[1, 0, 1],
    ),
    ClassCase(
        name="signs that look like numbers",
        labels=["²", "10", "--1", "-1", "①"],
        names=["-1", "10", "--1", "²", "①"],
        ids=[3, 1, 2, 0, 4],
    ),
]


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_labels_become_ids(case: ClassCase, make_run: MakeRun, tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": v} for i, v in enumerate(case.labels)]
    record, data = prepared(make_run(task="text-classification", dataset={"files": [write(tmp_path, "x.jsonl", rows)]}))
    assert (record.dataset.labels, data["train"]["labels"][:]) == (case.names, case.ids)
    assert data["train"].column_names == ["input_ids", "attention_mask", "labels", "length"]


OWN_NAMES: list[tuple[str, list[Any]]] = [
    ("fractions", [1.0, 0.0]),
    ("truth", [True, False]),
    ("names", ["b", "a"]),
    ("numbers", [7, 3]),
]


@pytest.mark.parametrize(("name", "given"), OWN_NAMES, ids=[c[0] for c in OWN_NAMES])
def test_a_column_of_our_own_name_does_not_decide_our_types(
    name: str, given: list[Any], make_run: MakeRun, tmp_path: Path
) -> None:
    rows = [{"attention_mask": f"row {i}", "labels": v} for i, v in enumerate(given)]
    dataset = {"files": [write(tmp_path, "x.jsonl", rows)], "columns": {"text": "attention_mask", "label": "labels"}}
    _, data = prepared(make_run(task="text-classification", dataset=dataset))
    assert {k: str(v) for k, v in data["train"].features.items()} == {
        "input_ids": "List(Value('int32'))",
        "attention_mask": "List(Value('int8'))",
        "labels": "Value('int64')",
        "length": "Value('int32')",
    }
    assert data["train"]["labels"][:] == [1, 0]


@dataclass(frozen=True)
class CutRowsCase:
    name: str
    given: dict[str, Any]
    notice: str | None


CUT = [
    CutRowsCase(
        name="texts",
        given={},
        notice="2 of 4 training rows are longer than 8 tokens and are cut",
    ),
    CutRowsCase(
        name="texts that fit",
        given={"maxLength": 16},
        notice=None,
    ),
    CutRowsCase(
        name="texts to classify",
        given=CLASSIFY,
        notice="1 of 4 training rows are longer than 8 tokens and are cut",
    ),
    CutRowsCase(
        name="packed texts",
        given={"packing": "concatenate"},
        notice=None,
    ),
]


@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_rows_that_are_cut_are_counted(
    case: CutRowsCase, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tilde is a token here; one more ends a text to learn from."""
    path = write(tmp_path, "x.jsonl", [{"text": "~" * n, "label": "ab"[n % 2]} for n in (1, 7, 8, 9)])
    task = {"task": case.given.get("task", "causal-lm")}
    training = {"maxLength": 8, "batchSize": 4} | {name: value for name, value in case.given.items() if name != "task"}
    main(make_run(dataset={"files": [path]}, training=training, **task))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spec.training.maxLength")]
    assert lines == ([f"spec.training.maxLength: {case.notice}"] if case.notice else [])


def test_a_new_model_learns_its_tokenizer_from_the_rows(make_run: MakeRun, corpus_file: Path) -> None:
    parameters = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    run = make_run(
        model={"config": {"modelType": "llama", "vocabSize": 400, "parameters": parameters}},
        method={"type": "full"},
        dataset={"files": [str(corpus_file)]},
        training={"maxLength": 64, "batchSize": 4, "packing": "concatenate"},
    )
    record, _ = prepared(run)
    model = AutoModelForCausalLM.from_pretrained(record.model_path)
    assert (
        len(AutoTokenizer.from_pretrained(Path(record.model_path).parent / "processor"))
        == 400
        == model.config.vocab_size
    )
    assert record.plan.parameters == sum(p.numel() for p in model.parameters())


def test_a_tokenizer_does_not_learn_from_rows_that_are_held_out(
    make_run: MakeRun, corpus_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def train(texts: Iterator[str], vocabulary: int, *given: Any) -> Any:
        seen.extend(texts)
        return train_tokenizer(iter(seen), vocabulary, *given)

    monkeypatch.setattr("luthier_trainer.models.new_tokenizer.train_tokenizer", train)
    parameters = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    run = make_run(
        model={"config": {"modelType": "llama", "vocabSize": 400, "parameters": parameters}},
        method={"type": "full"},
        dataset={"files": [str(corpus_rows)], "evalFraction": 0.25},
        training={"maxLength": 512, "batchSize": 4},
    )
    record, data = prepared(run)
    tokenizer = AutoTokenizer.from_pretrained(record.model_path)
    learnt, held = (
        [tokenizer.decode(ids, skip_special_tokens=True) for ids in data[split]["input_ids"]]
        for split in ("train", "eval")
    )
    assert (len(seen), len(held)) == (150, 50)
    assert [text[:200] for text in seen] == [text[:200] for text in learnt]


def test_a_full_disk_is_no_mistake_of_the_user(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The volume may be larger, or emptier, the next time."""

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/workspace/cache.arrow")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    with pytest.raises(OSError, match="No space left") as error:
        main(make_run())
    assert classify(error.value) == (
        ExitCode.STORAGE_ERROR,
        (
            "spec.workspace.size: no space is left on the volume ([Errno 28] No space left on device:"
            " '/workspace/cache.arrow'). Enlarge its claim, or free some of it"
        ),
    )


def test_a_finished_prepare_is_not_repeated(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl")
    run = make_run(dataset={"files": [path]})
    first = main(run)
    Path(path).unlink()
    assert main(run) == first


def test_an_interrupted_prepare_begins_again(make_run: MakeRun) -> None:
    run = make_run()
    first = main(run)
    record = Path(run.workspace) / "prepared" / "prepared.json"
    record.unlink()
    assert main(run) == first


def test_a_changed_manifest_sets_the_old_work_aside(make_run: MakeRun) -> None:
    main(make_run())
    folder = Path(make_run().workspace)
    (folder / "result").mkdir()
    changed = make_run(training={"maxLength": 32, "batchSize": 4})
    main(changed)
    assert read_prepared(changed).dataset.rows == 200
    assert sorted(p.name for p in (folder / "previous-1").iterdir()) == ["prepared", "result"]
    assert not (folder / "result").exists()


def test_what_may_change_does_not_count_as_a_change(make_run: MakeRun) -> None:
    main(make_run())
    main(make_run(restarts={"max": 9}, suspend=True, hub={"repo": "a/b", "tokenSecretRef": {"name": "hf"}}))
    assert not (Path(make_run().workspace) / "previous-1").exists()


@dataclass(frozen=True)
class LayoutCase:
    name: str
    before: dict[str, Any]
    after: dict[str, Any]


LAYOUTS = [
    LayoutCase(
        name="a smaller micro-batch",
        before={},
        after={"training": {"microBatchSize": 1}},
    ),
    LayoutCase(
        name="the planned micro-batch again",
        before={"training": {"microBatchSize": 1}},
        after={},
    ),
    LayoutCase(
        name="another strategy, with other checkpoints",
        before={},
        after={"strategy": "zero2"},
    ),
    LayoutCase(
        name="recomputed activations",
        before={},
        after={"training": {"gradientCheckpointing": True}},
    ),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_another_layout_is_planned_without_preparing_again(case: LayoutCase, make_run: MakeRun) -> None:
    def run_of(name: str, asked: dict[str, Any]) -> FineTuneRun:
        training = {"maxLength": 64, "batchSize": 4} | asked.get("training", {})
        resources = {"gpusPerNode": 0, "processesPerNode": 2}
        return make_run(name, **asked | {"training": training, "resources": resources, "method": {"type": "full"}})

    main(run_of("job", case.before))
    rows = Path(read_prepared(run_of("job", case.before)).dataset_path)
    made = rows.stat().st_mtime_ns
    again, fresh = main(run_of("job", case.after)), main(run_of("fresh", case.after))
    assert again.prepared is not None
    assert fresh.prepared is not None
    assert again.prepared.plan == fresh.prepared.plan == read_prepared(run_of("job", case.after)).plan
    assert rows.stat().st_mtime_ns == made


def test_many_labels_fit_the_termination_message(make_run: MakeRun, tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": f"a rather long name of a class, number {i}"} for i in range(100)]
    run = make_run(task="text-classification", dataset={"files": [write(tmp_path, "x.jsonl", rows)]})
    message = main(run)
    assert message.prepared is not None
    assert message.prepared.dataset.labels is None
    assert len(message.encode()) < LABELS_SHOWN_BYTES * 4
    labels = read_prepared(run).dataset.labels
    assert labels is not None
    assert len(labels) == 100


D, S = ExitCode.INVALID_DATASET, ExitCode.INVALID_SPEC


def only(**column: Any) -> list[dict[str, Any]]:
    return [{"text": r["text"]} | column for r in ROWS]


@dataclass(frozen=True)
class MistakeCase:
    name: str
    file: str
    code: ExitCode
    message: str  # {file} stands for its path
    content: object = None
    dataset: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)


MISTAKES = [
    MistakeCase(
        name="a column that is called otherwise",
        file="train.jsonl",
        content=[{"text": "a", "intent": "b"}],
        spec=CLASSIFY,
        code=D,
        message=(
            'spec.dataset.columns.label: no column "label" in train.jsonl (columns: text, intent). Did you mean'
            ' "intent"?'
        ),
    ),
    MistakeCase(
        name="a misspelt column",
        file="x.csv",
        dataset={"columns": {"text": "texts"}},
        code=D,
        message='spec.dataset.columns.text: no column "texts" in x.csv (columns: text, label). Did you mean "text"?',
    ),
    MistakeCase(
        name="no column that comes near",
        file="x.jsonl",
        content=[{"a": "1", "b": "2", "c": "3"}],
        code=D,
        message=(
            "spec.dataset.columns: x.jsonl has no columns by which its rows could be read (columns: a, b, c). To"
            " learn the texts of one of them, set spec.dataset.columns.text to it: a, b, c. To learn one as the answer"
            " to another, set spec.dataset.columns.prompt and spec.dataset.columns.completion"
        ),
    ),
    MistakeCase(
        name="numbers for text",
        file="x.jsonl",
        content=[{"text": 5, "body": "b"}],
        code=D,
        message='spec.dataset.columns.text: column "text" of x.jsonl holds int64, not text (columns of text: body)',
    ),
    MistakeCase(
        name="chats for text",
        file="x.jsonl",
        content=[{"text": [{"role": "user"}]}],
        code=D,
        message='spec.dataset.columns.text: column "text" of x.jsonl holds lists, not text (no column holds text)',
    ),
    MistakeCase(
        name="blank text to classify",
        file="x.jsonl",
        content=[*ROWS, {"text": " ", "label": "a"}],
        spec=CLASSIFY,
        code=D,
        message=(
            'spec.dataset.columns.text: column "text" of x.jsonl is blank in 1 of 9 rows. The first is row 8, counted'
            " from 0 (line 9 of x.jsonl). Remove them"
        ),
    ),
    MistakeCase(
        name="nothing but blanks",
        file="x.jsonl",
        content=[{"text": ""}],
        code=D,
        message='spec.dataset.columns.text: column "text" of x.jsonl is blank in all 1 rows',
    ),
    MistakeCase(
        name="a row without a label",
        file="x.jsonl",
        content=[*ROWS, {"text": "t", "label": None}],
        spec=CLASSIFY,
        code=D,
        message=(
            'spec.dataset.columns.label: column "label" of x.jsonl has no label in 1 rows. The first is row 8, counted'
            " from 0 (line 9 of x.jsonl). Remove them"
        ),
    ),
    MistakeCase(
        name="a number that is missing in CSV",
        file="x.csv",
        content="text,label\na,1\nb,\nc,0\n",
        spec=CLASSIFY,
        code=D,
        message=(
            'spec.dataset.columns.label: column "label" of x.csv has no label in 1 rows. The first is row 1, counted'
            " from 0 (line 3 of x.csv). Remove them"
        ),
    ),
    MistakeCase(
        name="one class",
        file="x.jsonl",
        content=only(label="a"),
        spec=CLASSIFY,
        code=D,
        message='spec.dataset.columns.label: all 8 rows of x.jsonl have the label "a"; two classes at least are needed',
    ),
    MistakeCase(
        name="scores for labels",
        file="x.jsonl",
        content=[{"text": "a", "label": 0.5}, {"text": "b", "label": 1.0}],
        spec=CLASSIFY,
        code=D,
        message='spec.dataset.columns.label: column "label" of x.jsonl holds 0.5; a label is a name or a whole number',
    ),
    MistakeCase(
        name="several labels a row",
        file="x.jsonl",
        content=only(label=["a", "b"]),
        spec=CLASSIFY,
        code=D,
        message=(
            'spec.dataset.columns.label: column "label" of x.jsonl holds lists; a label is a name or a whole number,'
            " one a row"
        ),
    ),
    MistakeCase(
        name="a broken CSV",
        file="x.csv",
        content='text,label\na,"b\n',
        code=D,
        message=(
            "spec.dataset.files: row 0, counted from 0 (line 2 of {file}) cannot be read as csv: a cell that begins"
            " with a quotation mark never ends."
        ),
    ),
    MistakeCase(
        name="broken JSON",
        file="x.jsonl",
        content='{"text": "a"}\n{"text": \n',
        code=D,
        message="spec.dataset.files: {file} cannot be read as json: ",
    ),
    MistakeCase(
        name="no parquet",
        file="x.parquet",
        content="text",
        code=D,
        message="spec.dataset.files: {file} cannot be read as parquet: Parquet file size is 4 bytes",
    ),
    MistakeCase(
        name="bytes that are no text",
        file="x.txt",
        content=b"a\n\xfa\xff",
        code=D,
        message="spec.dataset.files: {file} is not UTF-8: byte 0xfa at position 2 (line 2) is not valid",
    ),
    MistakeCase(
        name="an empty file",
        file="x.jsonl",
        content="",
        code=D,
        message="spec.dataset.files: {file} is empty",
    ),
    MistakeCase(
        name="a suffix that says nothing",
        file="x.dat",
        content="a",
        code=S,
        message=(
            "spec.dataset.format: cannot be determined from x.dat; set it to one of csv, json, jsonl, parquet, arrow,"
            " text, imagefolder, webdataset"
        ),
    ),
    MistakeCase(
        name="a file that is no archive",
        file="x.tar",
        content="a",
        code=D,
        message="spec.dataset.files: {file} cannot be read as webdataset: it is no tar archive, damaged or truncated (",
    ),
    MistakeCase(
        name="an archive of another kind",
        file="x.zip",
        content="a",
        code=D,
        message="spec.dataset.files: x.zip is an archive, which is not read; unpack it",
    ),
    MistakeCase(
        name="a file that is not there",
        file="rows.jsonl",
        dataset={"files": ["{folder}/row.jsonl"]},
        code=ExitCode.NOT_FOUND,
        message="spec.dataset.files[0]: there is no file {folder}/row.jsonl. Did you mean '{folder}/rows.jsonl'?",
    ),
    MistakeCase(
        name="a pattern that finds nothing",
        file="rows.jsonl",
        dataset={"files": ["{folder}/*.tsv"]},
        code=ExitCode.NOT_FOUND,
        message="spec.dataset.files[0]: there is no file {folder}/*.tsv. Is its volume listed under spec.volumes?",
    ),
    MistakeCase(
        name="a file of a volume that is not mounted",
        file="x.jsonl",
        dataset={"files": ["/data/none/x.jsonl"]},
        code=ExitCode.NOT_FOUND,
        message="spec.dataset.files[0]: there is no file /data/none/x.jsonl. Is its volume listed under spec.volumes?",
    ),
    MistakeCase(
        name="a folder for a file",
        file="rows.jsonl",
        dataset={"files": ["{folder}"]},
        code=ExitCode.NOT_FOUND,
        message=(
            "spec.dataset.files[0]: there is no file {folder}. It is a folder: name its files, for example"
            " {folder}/*.csv"
        ),
    ),
    MistakeCase(
        name="two formats",
        file="rows.jsonl",
        dataset={"files": ["{folder}/rows.jsonl", "{folder}/more.csv"]},
        code=S,
        message=(
            "spec.dataset.files: files of several formats (rows.jsonl, more.csv); use one format, or set"
            " spec.dataset.format"
        ),
    ),
    MistakeCase(
        name="the broken one of two files",
        file="a.jsonl",
        content="{",
        dataset={"files": ["{folder}/rows.jsonl", "{folder}/a.jsonl"]},
        code=D,
        message="spec.dataset.files: {file} cannot be read as json: ",
    ),
    MistakeCase(
        name="an unknown split",
        file="x.jsonl",
        dataset={"split": "test"},
        code=S,
        message="spec.dataset.split: there is no split 'test'; the splits are: train",
    ),
    MistakeCase(
        name="a slice that is none",
        file="x.jsonl",
        dataset={"split": "train[80%"},
        code=S,
        message="spec.dataset.split: 'train[80%' is not a split; write train, train[:80%] or train[100:200]",
    ),
    MistakeCase(
        name="an empty slice",
        file="x.jsonl",
        dataset={"split": "train[100:]"},
        code=D,
        message="spec.dataset.split: train[100:] of x.jsonl is empty: it has 8 rows",
    ),
    MistakeCase(
        name="measured on what was learnt",
        file="x.jsonl",
        dataset={"evalSplit": "train[75%:]"},
        code=S,
        message=(
            "spec.dataset.evalSplit: 2 of its rows are in split train too, and would be learnt and measured on."
            " Choose parts that do not overlap, such as train[:90%] and train[90%:]"
        ),
    ),
    MistakeCase(
        name="nothing to hold out",
        file="x.jsonl",
        dataset={"evalFraction": 0.01},
        code=D,
        message=(
            "spec.dataset.evalFraction: 0.01 of 8 rows is 0; both sides need one row at least. Choose another fraction"
        ),
    ),
    MistakeCase(
        name="labels that were never learnt",
        file="x.jsonl",
        dataset={"evalFiles": ["{folder}/other.jsonl"]},
        spec=CLASSIFY,
        code=D,
        message=(
            "spec.dataset.columns.label: other.jsonl has labels that the training rows do not have: z (theirs: a, b)"
        ),
    ),
    MistakeCase(
        name="measured on the file that was learnt",
        file="x.jsonl",
        dataset={"evalFiles": ["{folder}/rows.jsonl"]},
        code=S,
        message=(
            "spec.dataset.evalFiles: {folder}/rows.jsonl holds the same as {file} of spec.dataset.files, and would be"
            " learnt and measured on. Name other files, or hold rows out with evalFraction"
        ),
    ),
    MistakeCase(
        name="measured on a file of many that were learnt",
        file="other.jsonl",
        dataset={"files": ["{folder}/*.jsonl"], "evalFiles": ["{file}"]},
        code=S,
        message="spec.dataset.evalFiles: {file} is one of spec.dataset.files too, and would be learnt and measured on.",
    ),
    MistakeCase(
        name="a name that is taken for a chain",
        file="a::b.jsonl",
        code=S,
        message=(
            'spec.dataset.files[0]: {file} has "::" in its name, which the library that reads it takes for a file'
            " inside an archive; rename it"
        ),
    ),
    MistakeCase(
        name="no file to evaluate on",
        file="x.jsonl",
        dataset={"evalFiles": ["{folder}/none.jsonl"]},
        code=ExitCode.NOT_FOUND,
        message="spec.dataset.evalFiles[0]: there is no file {folder}/none.jsonl",
    ),
    MistakeCase(
        name="longer than the model",
        file="x.jsonl",
        spec={"training": {"maxLength": 4096}},
        code=S,
        message=(
            "spec.training.maxLength: 4096 tokens do not fit: the model has 256 positions (max_position_embeddings);"
            " set it to at most that"
        ),
    ),
    MistakeCase(
        name="a module that is not there",
        file="x.jsonl",
        spec={"method": {"type": "qlora", "targetModules": ["q_proj", "v_porj"]}},
        code=S,
        message=(
            "spec.method.targetModules[1]: the model has no module 'v_porj' (it has: down_proj, embed_tokens,"
            " gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj). Did you mean 'v_proj'?"
        ),
    ),
    MistakeCase(
        name="a module beside all of them",
        file="x.jsonl",
        spec={"method": {"type": "lora", "targetModules": ["q_proj", "all-linear"]}},
        code=S,
        message="spec.method.targetModules[1]: all-linear takes all linear modules; leave the others out, or it",
    ),
    MistakeCase(
        name="nothing like a module",
        file="x.jsonl",
        spec={"method": {"type": "lora", "targetModules": ["zzz"]}},
        code=S,
        message=(
            "spec.method.targetModules[0]: the model has no module 'zzz' (it has: down_proj, embed_tokens, gate_proj,"
            " k_proj, lm_head, o_proj, q_proj, up_proj, v_proj). Or use all-linear alone"
        ),
    ),
    MistakeCase(
        name="the head",
        file="x.jsonl",
        spec=CLASSIFY | {"method": {"type": "lora", "targetModules": ["q_proj", "score"]}},
        code=S,
        message="spec.method.targetModules[1]: 'score' is the head, which is trained whole in any case; leave it out",
    ),
    MistakeCase(
        name="no module, for a classifier",
        file="x.jsonl",
        spec=CLASSIFY | {"method": {"type": "lora", "targetModules": ["scores"]}},
        code=S,
        message=(
            "spec.method.targetModules[0]: the model has no module 'scores' (it has: down_proj, embed_tokens,"
            " gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj). Or use all-linear alone"
        ),
    ),
    MistakeCase(
        name="too narrow for NF4 on CPU",
        file="x.jsonl",
        spec={"method": {"type": "qlora"}},
        code=S,
        message=(
            "spec.method.type: nf4 on CPU needs widths of a multiple of 64, and the model's hidden_size is 32; use"
            " method.type: lora without model.quantization, or a GPU"
        ),
    ),
    MistakeCase(
        name="no such folder",
        file="x.jsonl",
        spec={"model": {"path": "/models/none"}},
        code=ExitCode.NOT_FOUND,
        message="spec.model.path: there is no folder /models/none. Is its volume listed under spec.volumes?",
    ),
    MistakeCase(
        name="a folder without a model",
        file="x.jsonl",
        spec={"model": {"path": "{folder}"}},
        code=S,
        message="spec.model.path: {folder} holds no config.json, model_index.json or adapter_config.json (it holds: ",
    ),
    MistakeCase(
        name="a job that is not mounted",
        file="x.jsonl",
        spec={"model": {"job": "other"}},
        code=ExitCode.NOT_FOUND,
        message="spec.model.job: the workspace of FineTuneJob other is not mounted here",
    ),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.name)
def test_a_mistake_names_its_field(case: MistakeCase, make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    path = write(folder, case.file, case.content)
    write(folder, "rows.jsonl")
    write(folder, "more.csv")
    write(folder, "other.jsonl", [{"text": "t", "label": "z"}])

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        if isinstance(value, list):
            return [fill(v) for v in value]
        return value.replace("{folder}", str(folder)).replace("{file}", path) if isinstance(value, str) else value

    with pytest.raises(Failure) as failure:
        main(make_run(dataset={"files": [path]} | fill(case.dataset), **fill(case.spec)))
    expect = case.message.replace("{folder}", str(folder)).replace("{file}", path)
    assert (failure.value.code, failure.value.message[: len(expect)]) == (case.code, expect)


def change(model: Path, into: Path, file: str, **fields: Any) -> str:
    """A copy of `model` with other fields in one of its JSON files; None removes a field."""
    shutil.copytree(model, into)
    data = json.loads((into / file).read_text()) | fields
    (into / file).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return str(into)


def test_a_tokenizer_without_an_end_is_refused(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    path = change(tiny_model, tmp_path / "m", "tokenizer_config.json", eos_token=None)
    with pytest.raises(
        Failure, match=r"spec\.model: its tokenizer has no end-of-text token.* Choose another model, or add eos_token"
    ) as failure:
        main(make_run(model={"path": path}))
    assert failure.value.code is S


def test_code_of_a_model_is_never_run(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    path = change(tiny_model, tmp_path / "m", "config.json", model_type="mine", auto_map={"AutoConfig": "evil.py"})
    (tmp_path / "m" / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(
        Failure, match=r"transformers has no architecture 'mine'\. It brings code of its own, which is never run"
    ):
        main(make_run(model={"path": path}))


def test_pickles_are_never_opened(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(Failure, match=r"spec\.model\.path: .* holds no weights \(\*\.safetensors\)"):
        main(make_run(model={"path": str(tmp_path / "m")}))
