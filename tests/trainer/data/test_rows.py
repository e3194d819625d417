"""Files to rows, or to a refusal: compared with what Python's own csv and json modules, or the eye, read in the same
bytes.
"""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import TrainingData
from luthier_api.spec import Csv
from luthier_trainer.data import csvregular, decoding, labels
from luthier_trainer.data.csvrows import CsvFile
from luthier_trainer.data.decoding import Decoder
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

UTF16, UTF32 = "utf-16", "utf-32"


@pytest.fixture(autouse=True)
def fresh_notices() -> None:
    notices.forget()


def load(
    folder: Path, files: dict[str, str | bytes], columns: tuple[str, ...] = ("text", "label"), **dataset: Any
) -> Rows:
    """What a FineTuneJob would read from files with these contents; with no `columns`, what a GenerateJob would."""
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    source = TrainingData.model_validate({"files": [str(folder / name) for name in files], **dataset})
    return Loader(source, "spec.dataset", folder / "cache", columns=columns, others=not columns).split(
        source.split, "split"
    )


def as_rows(rows: Rows) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in rows.data]


def refusal(folder: Path, files: dict[str, str | bytes], **dataset: Any) -> str:
    """The message, without the folder."""
    with pytest.raises(Failure) as failure:
        load(folder, files, **dataset)
    assert failure.value.code in (ExitCode.INVALID_DATASET, ExitCode.INVALID_SPEC)
    return failure.value.message.replace(f"{folder}/", "")


READ: list[tuple[str, str, str | bytes, dict[str, Any], list[tuple[Any, ...]]]] = [
    # name, file, content, dataset, rows
    ("a quoted comma", "x.csv", 'text,label\n"Hello, world",a\nb,c\n', {}, [("Hello, world", "a"), ("b", "c")]),
    ("doubled quotation marks", "x.csv", 'text,label\n"He said ""hi""",a\n', {}, [('He said "hi"', "a")]),
    ("a quotation mark inside an unquoted cell", "x.csv", 'text,label\n5" pipe,a\n', {}, [('5" pipe', "a")]),
    (
        "quotation marks after backslashes",
        "x.csv",
        'text,label\n"He said \\"hi, you\\"",a\n"C:\\dir \\n",b\n',
        {},
        [('He said "hi, you"', "a"), ("C:\\dir \\n", "b")],
    ),
    (
        "a backslash before the closing quotation mark",
        "x.csv",
        'text,label\n"C:\\dir\\",a\nb,c\n',
        {},
        [("C:\\dir\\", "a"), ("b", "c")],
    ),
    (
        "an escaped backslash before the closing one",
        "x.csv",
        'text,label\n"say \\"C:\\dir\\\\\\"",a\n"C:\\\\",b\n',
        {},
        [('say "C:\\dir\\"', "a"), ("C:\\", "b")],
    ),
    ("JSON in a cell", "x.csv", 'text,label\n"{""a"": ""x\\""y""}",a\n', {}, [('{"a": "x\\"y"}', "a")]),
    ("line breaks in a cell", "x.csv", 'text,label\r\n"a\r\nb",c\r\nd,e\r\n', {}, [("a\r\nb", "c"), ("d", "e")]),
    (
        "words that pandas takes for nothing",
        "x.csv",
        "text,label\nNA,null\nNone,nan\n",
        {},
        [("NA", "null"), ("None", "nan")],
    ),
    (
        "numbers stay as written",
        "x.csv",
        "text,label\n1e5,007\n2020-01-01,7\ntrue,1.0\n",
        {},
        [("1e5", "007"), ("2020-01-01", "7"), ("true", "1.0")],
    ),
    ("blank lines", "x.csv", "\ntext,label\n\na,b\n  \nc,d\n\n", {}, [("a", "b"), ("c", "d")]),
    ("columns in another order, and more of them", "x.csv", "n,label,m,text\n1,a,,b\n", {}, [("a", "b")]),
    ("text that begins as bzip2 does", "x.csv", "BZh9,text,label\n1,a,b\n", {}, [("a", "b")]),
    ("blanks around cells", "x.csv", "text,label\n a , neg\n", {}, [(" a ", " neg")]),
    ("semicolons", "x.csv", "text;label\na, b;c\n", {"csv": {"separator": "semicolon"}}, [("a, b", "c")]),
    ("no quoting, by the spec", "x.csv", 'text,label\n"a,b"\n', {"csv": {"quoting": "none"}}, [('"a', 'b"')]),
    (
        "TSV with ordinary quotation marks",
        "x.tsv",
        'text\tlabel\n"a\tb\nc"\td\n"" e\t"f"\n',
        {},
        [('"a', "b"), ('c"', "d"), ('"" e', '"f"')],
    ),
    (
        "TSV with quoting, by the spec",
        "x.tsv",
        'text\tlabel\n"a\tb"\tc\n',
        {"csv": {"quoting": "double"}},
        [("a\tb", "c")],
    ),
    ("tabs in .csv", "x.csv", 'text\tlabel\na,b\t"c\n', {"csv": {"separator": "tab"}}, [("a,b", '"c')]),
    ("a BOM in CSV", "x.csv", "\ufefftext,label\na,b\n", {}, [("a", "b")]),
    ("UTF-16 CSV", "x.csv", "text,label\nä,b\n".encode(UTF16), {}, [("ä", "b")]),
    ("UTF-32 JSON lines", "x.jsonl", '{"text": "ä", "label": "b"}\n'.encode(UTF32), {}, [("ä", "b")]),
    (
        "UTF-16 without a mark, by the spec",
        "x.csv",
        "text,label\nä,b\n".encode("utf-16-le"),
        {"encoding": "utf-16-le"},
        [("ä", "b")],
    ),
    ("cp1252, by the spec", "x.csv", "text,label\n’ä,b\n".encode("cp1252"), {"encoding": "cp1252"}, [("’ä", "b")]),
    ("a BOM in JSON lines", "x.jsonl", b'\xef\xbb\xbf{"text": "a", "label": "b"}\n', {}, [("a", "b")]),
    ("a BOM in a list", "x.json", b'\xef\xbb\xbf\n [{"text": "a", "label": "b"}]', {}, [("a", "b")]),
    (
        "joined files, each with a BOM",
        "x.jsonl",
        '\ufeff{"text": "a", "label": "b"}\n\ufeff{"text": "c", "label": "d"}\n',
        {},
        [("a", "b"), ("c", "d")],
    ),
    (
        "a list over several lines",
        "x.json",
        '[\n {"text": "a",\n "label": "b"} ,\n{"text": "c", "label": "d"}\n]\n',
        {},
        [("a", "b"), ("c", "d")],
    ),
    ("a list in .jsonl", "x.jsonl", '[{"text": "a", "label": "b"}]', {}, [("a", "b")]),
    (
        "dates in JSON",
        "x.jsonl",
        '{"text": "2020-01-01", "label": "2020-01-01T00:00:00Z"}\n',
        {},
        [("2020-01-01", "2020-01-01T00:00:00Z")],
    ),
    (
        "blank lines in JSON lines",
        "x.jsonl",
        '\n{"text": "a", "label": "b"}\n \n{"text": "c", "label": "d"}',
        {},
        [("a", "b"), ("c", "d")],
    ),
    ("a key that is missing", "x.jsonl", '{"text": "a", "label": "b"}\n{"text": "c"}\n', {}, [("a", "b"), ("c", None)]),
    (
        "numbers, then fractions",
        "x.jsonl",
        '{"text": "a", "label": 1}\n' * 1500 + '{"text": "a", "label": 2.5}\n',
        {},
        [("a", 1.0)] * 1500 + [("a", 2.5)],
    ),
    (
        "other spaces inside a line",
        "x.jsonl",
        '{"text": "a\u2028b\x85c", "label": "b"}\n',
        {},
        [("a\u2028b\x85c", "b")],
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "dataset", "expect"), READ, ids=[c[0] for c in READ])
def test_files_that_are_read(
    name: str, file: str, content: str | bytes, dataset: dict[str, Any], expect: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    assert as_rows(load(tmp_path, {file: content}, **dataset)) == expect


REFUSED: list[tuple[str, dict[str, str | bytes], dict[str, Any], str]] = [
    # name, files, dataset, how the message begins
    (
        "an unquoted comma",
        {"x.csv": "text,label\na,b\nHello, world,c\n"},
        {},
        (
            "spec.dataset.files: row 1, counted from 0 (line 3 of x.csv) has 3 fields, and the header has 2 (text,"
            ' label). With the first as an index, as pandas has it, it would be text=" world", label="c"; with the'
            ' first ones joined, text="Hello, world", label="c". Put quotation marks around cells that hold \',\''
        ),
    ),
    (
        "an unquoted comma in every row",
        {"x.csv": "text,label\na,b,c\n"},
        {},
        "spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) has 3 fields",
    ),
    (
        "a comma at the end of each row",
        {"x.csv": "text,label\na,b,\nc,d,\n"},
        {},
        "spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) has 3 fields",
    ),
    (
        "a tab too many",
        {"x.tsv": "text\tlabel\na\tb\n\nc\td\te\n"},
        {},
        "spec.dataset.files: row 1, counted from 0 (line 4 of x.tsv) has 3 fields",
    ),
    (
        "a field too few",
        {"x.csv": 'text,label\n"a\nb",c\nd\n'},
        {},
        (
            "spec.dataset.files: row 1, counted from 0 (line 4 of x.csv) has 1 fields, and the header has 2 (text,"
            " label). A line break in a cell needs"
        ),
    ),
    (
        "a quoted word that begins a cell",
        {"x.csv": 'text,label\na,b\n"Hello" he said,c\n'},
        {},
        (
            "spec.dataset.files: row 1, counted from 0 (line 3 of x.csv) cannot be read as csv: a cell that begins with"
            " a quotation mark goes on after its second one."
        ),
    ),
    (
        "doubled and escaped quotation marks in one file",
        {"x.csv": 'text,label\n"a \\"b\\"",c\n"a ""b""",c\n'},
        {},
        "spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) cannot be read as csv",
    ),
    (
        "two readings",
        {"x.csv": 'text,label\nsay \\"hi\\",c\n'},
        {},
        (
            'spec.dataset.files: x.csv can be read in two ways: row 0, counted from 0, is "say \\"hi\\"", "c" with'
            ' quotation marks that are doubled, and "say "hi"", "c"'
        ),
    ),
    (
        "semicolons",
        {"x.csv": "text;label\na, b;c\n"},
        {},
        (
            "spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) has 2 fields, and the header has 1"
            " (text;label). The only column is called 'text;label'. If its cells are separated by semicolon, set"
            " spec.dataset.csv.separator to semicolon"
        ),
    ),
    (
        "a column twice",
        {"x.csv": "text,label,text\na,b,c\n"},
        {},
        'spec.dataset.files: x.csv has 2 columns that are called "text". Rename all but one',
    ),
    (
        "the second of two files",
        {"x.csv": "text,label\na,b\n", "y.csv": "text,intent\na,b\n"},
        {},
        'spec.dataset.files: y.csv has no column "label" (columns: text, intent), and x.csv has one',
    ),
    (
        "the first of two files",
        {"x.csv": "body,label\na,b\n", "y.csv": "text,label\na,b\n"},
        {},
        'spec.dataset.files: x.csv has no column "text" (columns: body, label), and y.csv has one',
    ),
    (
        "cp1252",
        {"x.csv": "text,label\na,b\nit’s,c\n".encode("cp1252")},
        {},
        (
            "spec.dataset.files: x.csv is not UTF-8: byte 0x92 at position 17 (line 3) is not valid. Set"
            " spec.dataset.encoding to the encoding that the file was written in, such as cp1252, where that byte"
            ' is "’"'
        ),
    ),
    (
        "latin-1 JSON lines",
        {"x.jsonl": '{"text": "ä"}\n'.encode("latin-1")},
        {},
        "spec.dataset.files: x.jsonl is not UTF-8: byte 0xe4 at position 10 (line 1)",
    ),
    (
        "UTF-16 without a mark",
        {"x.jsonl": '{"text": "a"}\n'.encode("utf-16-le")},
        {},
        "spec.dataset.files: x.jsonl holds NUL bytes (the first at position 1), as UTF-16",
    ),
    (
        "an encoding against the mark",
        {"x.csv": "\ufefftext,label\na,b\n"},
        {"encoding": "cp1252"},
        (
            "spec.dataset.files: x.csv begins with the byte order mark of UTF-8, but spec.dataset.encoding is cp1252."
            " Remove encoding, or the mark"
        ),
    ),
    (
        "an encoding that does not exist",
        {"x.csv": "text,label\na,b\n"},
        {"encoding": "cp99"},
        "spec.dataset.encoding: Python has no text encoding 'cp99'",
    ),
    (
        "an encoding of Parquet",
        {"x.parquet": b"PAR1"},
        {"encoding": "cp1252"},
        "spec.dataset.encoding: parquet is no format of text, and has no encoding",
    ),
    (
        "how CSV is written, for JSON",
        {"x.jsonl": "{}"},
        {"csv": {"separator": "tab"}},
        "spec.dataset.csv: belongs to files of the format csv, and x.jsonl is read as json",
    ),
    (
        "a file cut short",
        {"x.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 99)[:-9]},
        {},
        "spec.dataset.files: x.jsonl.gz cannot be decompressed: Compressed file ended",
    ),
    (
        "zstd cut short",
        {"x.jsonl.zst": pyarrow.compress(b'{"text": "a"}\n' * 99, "zstd", asbytes=True)[:-9]},
        {},
        "spec.dataset.files: x.jsonl.zst cannot be decompressed: Truncated compressed stream",
    ),
    (
        "broken JSON",
        {"x.jsonl": '{"text": "a"}\n{"text": \n'},
        {},
        "spec.dataset.files: x.jsonl cannot be read as json: line 2, column 9: Expecting value.",
    ),
    (
        "a list that does not end",
        {"x.json": '[{"text": "a"},\n{"text": "b"}'},
        {},
        "spec.dataset.files: x.json cannot be read as json: the list that begins the file has no end",
    ),
    (
        "something after the list",
        {"x.json": '[{"text": "a"}]\n[]'},
        {},
        "spec.dataset.files: x.json cannot be read as json: line 1: something follows the end of the list",
    ),
    (
        "no objects",
        {"x.json": '[{"text": "a"},\n["b"]]'},
        {},
        (
            "spec.dataset.files: x.json cannot be read as json: row 1, counted from 0 (line 2), is no object but of"
            " kind: lists"
        ),
    ),
    (
        "a key twice",
        {"x.jsonl": '{"text": "a", "text": "b"}\n'},
        {},
        'spec.dataset.files: x.jsonl cannot be read as json: line 1: an object has the key "text" more than once',
    ),
    (
        "half a character",
        {"x.jsonl": '{"text": "\\ud83d"}\n'},
        {},
        "spec.dataset.files: x.jsonl has half a surrogate pair",
    ),
]


@pytest.mark.parametrize(("name", "files", "dataset", "message"), REFUSED, ids=[c[0] for c in REFUSED])
def test_files_that_are_refused(
    name: str, files: dict[str, str | bytes], dataset: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert refusal(tmp_path, files, **dataset)[: len(message)] == message


NOTICED: list[tuple[str, str, str | bytes, str | None]] = [
    # name, file, content, how the notice begins
    (
        "backslashes",
        "x.csv",
        'text,label\n"a \\"b\\"",c\n',
        (
            'spec.dataset.csv.quoting: the quotation marks in the cells of x.csv stand after backslashes (\\"), and are'
            " read so, as with quoting: backslash"
        ),
    ),
    (
        "rows of several lines",
        "x.csv",
        'text,label\na,b\n"c\nd",e\n',
        (
            "spec.dataset.files: 1 of 2 rows of x.csv span several lines (the first: row 1, counted from 0, line 3). If"
            " quotation marks are ordinary characters there, set"
        ),
    ),
    (
        "cells between quotation marks in TSV",
        "x.tsv",
        'text\tlabel\n"a ""b"""\tc\n',
        "spec.dataset.csv.quoting: 1 cells of x.tsv begin and end with a quotation mark",
    ),
    (
        "UTF-16",
        "x.csv",
        "text,label\na,b\n".encode(UTF16),
        "spec.dataset.files: x.csv is read as UTF-16, by its byte order mark",
    ),
    (
        "joined files",
        "x.jsonl",
        '\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n',
        "spec.dataset.files: x.jsonl has byte order marks at the beginning of 1 lines",
    ),
    (
        "blank lines",
        "x.txt",
        "a\n\n \nb\n\n",
        "spec.dataset.files: 2 blank lines of x.txt are left out, and are no rows",
    ),
    ("an ordinary file", "x.csv", "\ufefftext,label\na,b\n\n", None),
]


@pytest.mark.parametrize(("name", "file", "content", "notice"), NOTICED, ids=[c[0] for c in NOTICED])
def test_what_is_chosen_is_noticed(
    name: str, file: str, content: str | bytes, notice: str | None, tmp_path: Path
) -> None:
    load(tmp_path, {file: content})
    assert [given[: len(notice or "")] for given in notices.given()] == ([notice] if notice else [])


PACKED = [
    (".gz", gzip.compress),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
    (".zst", lambda data: pyarrow.compress(data, "zstd", asbytes=True)),
]


@pytest.mark.parametrize(("suffix", "compress"), PACKED, ids=[c[0] for c in PACKED])
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt"])
def test_compressed_files(name: str, suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Also of several members, as `cat` and parallel compressors make them."""
    first, second = {"x.csv": ("text,label\nä,b\n", "c,d\n"), "x.txt": ("ä\n", "c\n")}.get(
        name, ('{"text": "ä", "label": "b"}\n', '{"text": "c", "label": "d"}\n')
    )
    data = load(tmp_path, {name + suffix: compress(first.encode()) + compress(second.encode())}).data
    assert data["text"][:] == ["ä", "c"]


def test_any_csv_that_python_writes_is_read_back(tmp_path: Path) -> None:
    """Random cells of the characters that matter, in every separator."""
    draw = random.Random(5)
    for number in range(60):
        separator, code = draw.choice([(",", "comma"), (";", "semicolon"), ("|", "pipe"), ("\t", "tab")])
        quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        rows = [
            ("".join(draw.choices("ab '\",;|\t\n\r\\ä\u2028", k=draw.randrange(1, 9))), draw.choice("ab"))
            for _ in range(draw.randrange(1, 40))
        ]
        folder = tmp_path / str(number)
        folder.mkdir()
        with (folder / "x.csv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter=separator, quoting=quoting)
            writer.writerows([("text", "label"), *rows])
        data = load(folder, {"x.csv": (folder / "x.csv").read_bytes()}, csv={"separator": code, "quoting": "double"})
        assert as_rows(data) == rows


def test_arrow_reads_what_csv_reads_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes of a CSV, in chunks of a few bytes: the same rows, or the same refusal, as by csv alone."""
    monkeypatch.setattr(csvregular, "CHUNK", 7)
    draw = random.Random(7)
    by_arrow = 0
    for _ in range(250):
        quiet = draw.random() < 0.5
        lines = []
        for _ in range(draw.randrange(1, 6)):
            cells = [
                "".join(draw.choices("ab ä" if quiet else 'ab",\\ \n\ufeff', k=draw.randrange(5))) for _ in range(2)
            ]
            lines.append(
                ",".join('"' + cell.replace('"', '""') + '"' if draw.random() < 0.5 else cell for cell in cells)
            )
        end = draw.choice(["\n", "\r\n"])
        path = tmp_path / "x.csv"
        path.write_bytes(
            (draw.choice(["", "\ufeff"]) + "text,label" + end + end.join(lines) + draw.choice(["", end])).encode()
        )
        by_arrow += csvregular.is_regular(path, ",", True)
        assert outcome(path, False) == outcome(path, True)
    assert by_arrow > 40


def outcome(path: Path, by_csv_alone: bool) -> list[tuple[str, str]] | str:
    """All rows that are read, or the refusal."""
    file = CsvFile(path, Decoder(None, "d", "d.files"), Csv(quoting="double"))
    try:
        found = file._strictly(["text", "label"], 0) if by_csv_alone else file.batches(["text", "label"])
        return [row for _, (texts, names) in found for row in zip(map(str, texts), map(str, names), strict=True)]
    except Failure as failure:
        return failure.message


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_json_of_any_size_is_read_as_python_reads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than is decoded at once, so that values lie across the borders of what is in memory."""
    monkeypatch.setattr(decoding, "CHUNK", 1000)
    draw = random.Random(6)
    rows = [
        {
            "text": "".join(draw.choices('ab"\\{}[],:ä\n\u2028', k=draw.randrange(1, 500))),
            "n": draw.randrange(99),
            "label": i % 7,
        }
        for i in range(500)
    ]
    content = (
        json.dumps(rows, indent=draw.choice([0, 1]))
        if name == "x.json"
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    assert as_rows(load(tmp_path, {name: content})) == [(row["text"], row["label"]) for row in rows]


LATE: list[tuple[str, str, str]] = [
    # a column that the job does not use, and that changes after more rows than are looked at first
    ("x.csv", "text,label,other\n" + "a,b,1\n" * 30_000, "a,b,not a number\n"),
    (
        "x.jsonl",
        '{"text": "a", "label": "b", "other": 1}\n' * 30_000,
        '{"text": "a", "label": "b", "other": {"not": ["a number"]}}\n',
    ),
]


@pytest.mark.parametrize(("name", "early", "late"), LATE, ids=[c[0] for c in LATE])
def test_a_column_that_the_job_does_not_use_does_not_stop_it(name: str, early: str, late: str, tmp_path: Path) -> None:
    assert len(load(tmp_path, {name: early + late}).data) == 30_001


def test_a_job_that_reads_all_columns_keeps_what_has_no_single_type_as_json(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "id": 2**53 + 1, "mixed": 1, "list": [1]},
        {"prompt": "b", "id": 2**53 + 2, "mixed": "x", "list": None, "late": True},
    ]
    found = load(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}, columns=())
    assert as_rows(found) == [("a", 2**53 + 1, "1", "[1]", None), ("b", 2**53 + 2, '"x"', None, True)]
    assert found.mixed == {"mixed": "numbers in 1 rows and text in 1 rows", "list": "lists"}


PARQUET: list[tuple[str, pyarrow.DataType]] = [
    ("string", pyarrow.string()),
    ("large_string", pyarrow.large_string()),
    ("string_view", pyarrow.string_view()),
    ("dictionary", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
]


@pytest.mark.parametrize(("name", "kind"), PARQUET, ids=[c[0] for c in PARQUET])
def test_text_of_parquet(name: str, kind: pyarrow.DataType, tmp_path: Path) -> None:
    table = pyarrow.table(
        {"n": [1, 2], "label": pyarrow.array(["007", "7"]).cast(kind), "text": pyarrow.array(["a", "b"]).cast(kind)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    rows = load(tmp_path, {"x.parquet": (tmp_path / "x.parquet").read_bytes()})
    assert [(row["text"], row["label"]) for row in rows.data] == [("a", "007"), ("b", "7")]
    assert labels.names_of(rows, "label", "f", merge=False) == ["007", "7"]


def test_what_was_given_up_never_reaches_the_rows(tmp_path: Path) -> None:
    """The first rows are written with a type that a later row does not have, and then written again with another."""
    rows = [{"text": str(i) * 3, "label": i} for i in range(2000)] + [{"text": "x", "label": 0.5}]
    found = load(tmp_path, {"x.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    gc.collect()
    assert as_rows(found) == [(row["text"], row["label"]) for row in rows]


def test_a_column_of_two_types_that_the_job_does_not_need_is_left_out(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {}
    for name, note, empty in (("x.parquet", 1, None), ("y.parquet", "1", "z")):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "note": [note], "empty": [empty]}), tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    assert as_rows(load(tmp_path, files, columns=())) == [("a", None), ("a", "z")]
    assert notices.given()[0].endswith(
        'column "note" of ' + f"{tmp_path}/y.parquet holds string, and in x.parquet int64; it is left out"
    )


def test_parquet_files_of_two_types_name_the_column_and_the_file(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {}
    for name, label in (("x.parquet", 1), ("y.parquet", "1")):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [label]}), tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
    message = (
        'spec.dataset.files: column "label" of y.parquet holds string, and in x.parquet int64. Write it with the same'
        " type in all files"
    )
    assert refusal(tmp_path, files) == message


PLACES: list[tuple[str, dict[str, str | bytes], int, str]] = [
    (
        "blank lines and cells of several lines",
        {"x.csv": '\ntext,label\n\n"a\nb",c\n\nd,e\n'},
        1,
        "row 1, counted from 0 (line 7 of x.csv)",
    ),
    (
        "the second file",
        {"x.csv": "text,label\na,b\n", "y.csv": "label,text\nc,d\ne,f\n"},
        2,
        "row 2, counted from 0 (line 3 of y.csv)",
    ),
    ("JSON lines", {"x.jsonl": '\n{"text": "a"}\n\n{"text": "b"}\n'}, 1, "row 1, counted from 0 (line 4 of x.jsonl)"),
    ("a list", {"x.json": '[{"text":\n "a"},\n\n{"text": "b"}]'}, 1, "row 1, counted from 0 (line 4 of x.json)"),
    ("text", {"x.txt": "a\n\nb\n"}, 1, "row 1, counted from 0 (line 3 of x.txt)"),
]


@pytest.mark.parametrize(("name", "files", "row", "place"), PLACES, ids=[c[0] for c in PLACES])
def test_a_row_has_a_number_and_a_line(
    name: str, files: dict[str, str | bytes], row: int, place: str, tmp_path: Path
) -> None:
    rows = load(tmp_path, files)
    assert rows.place(row) == place
    assert rows.select(numpy.array([row])).place(0) == place, "a row keeps its number when others are left out"


def test_slices_keep_the_numbers_of_rows(tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "{i}"}}\n' for i in range(10))
    assert (
        load(tmp_path, {"x.jsonl": lines}, split="train[2:4]+train[7:]").place(2)
        == "row 7, counted from 0 (line 8 of x.jsonl)"
    )


DESCRIBED: list[tuple[str, dict[str, str], list[tuple[str, str]] | str]] = [
    # name, tables in the folder, (image, label) of each row or how the message begins
    (
        "labels that look like numbers",
        {"metadata.csv": "file_name,label\na/1.png,007\nb/2.png,7\n"},
        [("a/1.png", "007"), ("b/2.png", "7")],
    ),
    (
        "a table in each folder",
        {
            "a/metadata.jsonl": '{"file_name": "1.png", "label": "x"}',
            "b/metadata.jsonl": '{"file_name": "../b/2.png", "label": "y"}',
        },
        [("a/1.png", "x"), ("b/2.png", "y")],
    ),
    (
        "an unquoted comma",
        {"metadata.csv": "file_name,label\na/1.png,b, c\n"},
        "spec.dataset.files: row 0, counted from 0 (line 2 of pets/metadata.csv) has 3 fields",
    ),
    (
        "an image that is not there",
        {"metadata.csv": "file_name,label\na/1.png,b\na/3.png,b\n"},
        (
            'spec.dataset.files: row 1, counted from 0 (line 3 of metadata.csv): pets has no image "a/3.png". Correct'
            " file_name, or add the image"
        ),
    ),
    (
        "no name of a file",
        {"metadata.csv": "file,label\na/1.png,b\n"},
        'spec.dataset.files: metadata.csv has no column "file_name" of text, which names the image',
    ),
]


@pytest.mark.parametrize(("name", "tables", "expect"), DESCRIBED, ids=[c[0] for c in DESCRIBED])
def test_tables_beside_images(
    name: str, tables: dict[str, str], expect: list[tuple[str, str]] | str, tmp_path: Path
) -> None:
    folder = tmp_path / "pets"
    for path in ("a/1.png", "b/2.png"):
        (folder / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / path)
    for path, content in tables.items():
        (folder / path).write_text(content)
    source = TrainingData.model_validate({"files": [str(folder)], "format": "imagefolder"})
    loader = Loader(source, "spec.dataset", tmp_path / "cache", columns=("image", "label"), others=False)
    if isinstance(expect, str):
        with pytest.raises(Failure) as failure:
            loader.split("train", "split")
        assert failure.value.message.replace(f"{tmp_path}/", "").startswith(expect)
        return
    rows = loader.split("train", "split").data
    paths = [image["path"] for image in rows.cast_column("image", datasets.Image(decode=False))["image"]]
    assert list(zip([str(Path(path).relative_to(folder)) for path in paths], rows["label"], strict=True)) == expect
