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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from luthier_api.dataset import TrainingData
from luthier_api.exitcodes import ExitCode
from luthier_api.formats import FORMATS
from luthier_api.spec import Csv
from luthier_trainer.data import csvregular, decoding, labels
from luthier_trainer.data.csvrows import CsvFile
from luthier_trainer.data.decoding import Decoder
from luthier_trainer.data.filerows import READERS
from luthier_trainer.data.files import READ_AS
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.data.windows import PIECES
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


@dataclass(frozen=True)
class ReadCase:
    name: str
    file: str
    content: str | bytes
    expect: list[tuple[Any, ...]]
    dataset: dict[str, Any] = field(default_factory=dict)


READ = [
    ReadCase(
        name="a quoted comma",
        file="x.csv",
        content='text,label\n"Hello, world",a\nb,c\n',
        expect=[("Hello, world", "a"), ("b", "c")],
    ),
    ReadCase(
        name="doubled quotation marks",
        file="x.csv",
        content='text,label\n"He said ""hi""",a\n',
        expect=[('He said "hi"', "a")],
    ),
    ReadCase(
        name="a quotation mark inside an unquoted cell",
        file="x.csv",
        content='text,label\n5" pipe,a\n',
        expect=[('5" pipe', "a")],
    ),
    ReadCase(
        name="quotation marks after backslashes",
        file="x.csv",
        content='text,label\n"He said \\"hi, you\\"",a\n"C:\\dir \\n",b\n',
        expect=[('He said "hi, you"', "a"), ("C:\\dir \\n", "b")],
    ),
    ReadCase(
        name="a backslash before the closing quotation mark",
        file="x.csv",
        content='text,label\n"C:\\dir\\",a\nb,c\n',
        expect=[("C:\\dir\\", "a"), ("b", "c")],
    ),
    ReadCase(
        name="an escaped backslash before the closing one",
        file="x.csv",
        content='text,label\n"say \\"C:\\dir\\\\\\"",a\n"C:\\\\",b\n',
        expect=[('say "C:\\dir\\"', "a"), ("C:\\", "b")],
    ),
    ReadCase(
        name="JSON in a cell",
        file="x.csv",
        content='text,label\n"{""a"": ""x\\""y""}",a\n',
        expect=[('{"a": "x\\"y"}', "a")],
    ),
    ReadCase(
        name="line breaks in a cell",
        file="x.csv",
        content='text,label\r\n"a\r\nb",c\r\nd,e\r\n',
        expect=[("a\r\nb", "c"), ("d", "e")],
    ),
    ReadCase(
        name="words that pandas takes for nothing",
        file="x.csv",
        content="text,label\nNA,null\nNone,nan\n",
        expect=[("NA", "null"), ("None", "nan")],
    ),
    ReadCase(
        name="numbers stay as written",
        file="x.csv",
        content="text,label\n1e5,007\n2020-01-01,7\ntrue,1.0\n",
        expect=[("1e5", "007"), ("2020-01-01", "7"), ("true", "1.0")],
    ),
    ReadCase(
        name="blank lines",
        file="x.csv",
        content="\ntext,label\n\na,b\n  \nc,d\n\n",
        expect=[("a", "b"), ("c", "d")],
    ),
    ReadCase(
        name="columns in another order, and more of them",
        file="x.csv",
        content="n,label,m,text\n1,a,,b\n",
        expect=[("a", "b")],
    ),
    ReadCase(
        name="text that begins as bzip2 does",
        file="x.csv",
        content="BZh9,text,label\n1,a,b\n",
        expect=[("a", "b")],
    ),
    ReadCase(
        name="blanks around cells",
        file="x.csv",
        content="text,label\n a , neg\n",
        expect=[(" a ", " neg")],
    ),
    ReadCase(
        name="semicolons",
        file="x.csv",
        content="text;label\na, b;c\n",
        dataset={"csv": {"separator": "semicolon"}},
        expect=[("a, b", "c")],
    ),
    ReadCase(
        name="no quoting, by the spec",
        file="x.csv",
        content='text,label\n"a,b"\n',
        dataset={"csv": {"quoting": "none"}},
        expect=[('"a', 'b"')],
    ),
    ReadCase(
        name="TSV with ordinary quotation marks",
        file="x.tsv",
        content='text\tlabel\n"a\tb\nc"\td\n"" e\t"f"\n',
        expect=[('"a', "b"), ('c"', "d"), ('"" e', '"f"')],
    ),
    ReadCase(
        name="TSV with quoting, by the spec",
        file="x.tsv",
        content='text\tlabel\n"a\tb"\tc\n',
        dataset={"csv": {"quoting": "double"}},
        expect=[("a\tb", "c")],
    ),
    ReadCase(
        name="tabs in .csv",
        file="x.csv",
        content='text\tlabel\na,b\t"c\n',
        dataset={"csv": {"separator": "tab"}},
        expect=[("a,b", '"c')],
    ),
    ReadCase(
        name="a BOM in CSV",
        file="x.csv",
        content="\ufefftext,label\na,b\n",
        expect=[("a", "b")],
    ),
    ReadCase(
        name="UTF-16 CSV",
        file="x.csv",
        content="text,label\nä,b\n".encode(UTF16),
        expect=[("ä", "b")],
    ),
    ReadCase(
        name="UTF-32 JSON lines",
        file="x.jsonl",
        content='{"text": "ä", "label": "b"}\n'.encode(UTF32),
        expect=[("ä", "b")],
    ),
    ReadCase(
        name="UTF-16 without a mark, by the spec",
        file="x.csv",
        content="text,label\nä,b\n".encode("utf-16-le"),
        dataset={"encoding": "utf-16-le"},
        expect=[("ä", "b")],
    ),
    ReadCase(
        name="cp1252, by the spec",
        file="x.csv",
        content="text,label\n’ä,b\n".encode("cp1252"),
        dataset={"encoding": "cp1252"},
        expect=[("’ä", "b")],
    ),
    ReadCase(
        name="a BOM in JSON lines",
        file="x.jsonl",
        content=b'\xef\xbb\xbf{"text": "a", "label": "b"}\n',
        expect=[("a", "b")],
    ),
    ReadCase(
        name="a BOM in a list",
        file="x.json",
        content=b'\xef\xbb\xbf\n [{"text": "a", "label": "b"}]',
        expect=[("a", "b")],
    ),
    ReadCase(
        name="joined files, each with a BOM",
        file="x.jsonl",
        content='\ufeff{"text": "a", "label": "b"}\n\ufeff{"text": "c", "label": "d"}\n',
        expect=[("a", "b"), ("c", "d")],
    ),
    ReadCase(
        name="a list over several lines",
        file="x.json",
        content='[\n {"text": "a",\n "label": "b"} ,\n{"text": "c", "label": "d"}\n]\n',
        expect=[("a", "b"), ("c", "d")],
    ),
    ReadCase(
        name="a list in .jsonl",
        file="x.jsonl",
        content='[{"text": "a", "label": "b"}]',
        expect=[("a", "b")],
    ),
    ReadCase(
        name="dates in JSON",
        file="x.jsonl",
        content='{"text": "2020-01-01", "label": "2020-01-01T00:00:00Z"}\n',
        expect=[("2020-01-01", "2020-01-01T00:00:00Z")],
    ),
    ReadCase(
        name="blank lines in JSON lines",
        file="x.jsonl",
        content='\n{"text": "a", "label": "b"}\n \n{"text": "c", "label": "d"}',
        expect=[("a", "b"), ("c", "d")],
    ),
    ReadCase(
        name="a key that is missing",
        file="x.jsonl",
        content='{"text": "a", "label": "b"}\n{"text": "c"}\n',
        expect=[("a", "b"), ("c", None)],
    ),
    ReadCase(
        name="numbers, then fractions",
        file="x.jsonl",
        content='{"text": "a", "label": 1}\n' * 1500 + '{"text": "a", "label": 2.5}\n',
        expect=[("a", 1.0)] * 1500 + [("a", 2.5)],
    ),
    ReadCase(
        name="other spaces inside a line",
        file="x.jsonl",
        content='{"text": "a\u2028b\x85c", "label": "b"}\n',
        expect=[("a\u2028b\x85c", "b")],
    ),
]


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_files_that_are_read(case: ReadCase, tmp_path: Path) -> None:
    assert as_rows(load(tmp_path, {case.file: case.content}, **case.dataset)) == case.expect


def test_each_format_of_files_has_a_reader() -> None:
    assert READERS.keys() == {*READ_AS.values()} - {"imagefolder"}
    assert PIECES.keys() == {READ_AS[name] for name, info in FORMATS.items() if info.streamed}


@dataclass(frozen=True)
class RefusedCase:
    name: str
    files: dict[str, str | bytes]
    message: str  # its beginning
    dataset: dict[str, Any] = field(default_factory=dict)


REFUSED = [
    RefusedCase(
        name="an unquoted comma",
        files={"x.csv": "text,label\na,b\nHello, world,c\n"},
        message=(
            "spec.dataset.files: row 1, counted from 0 (line 3 of x.csv) has 3 fields, and the header has 2 (text,"
            ' label). With the first as an index, as pandas has it, it would be text=" world", label="c"; with the'
            ' first ones joined, text="Hello, world", label="c". Put quotation marks around cells that hold \',\''
        ),
    ),
    RefusedCase(
        name="an unquoted comma in every row",
        files={"x.csv": "text,label\na,b,c\n"},
        message="spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) has 3 fields",
    ),
    RefusedCase(
        name="a comma at the end of each row",
        files={"x.csv": "text,label\na,b,\nc,d,\n"},
        message="spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) has 3 fields",
    ),
    RefusedCase(
        name="a tab too many",
        files={"x.tsv": "text\tlabel\na\tb\n\nc\td\te\n"},
        message="spec.dataset.files: row 1, counted from 0 (line 4 of x.tsv) has 3 fields",
    ),
    RefusedCase(
        name="a field too few",
        files={"x.csv": 'text,label\n"a\nb",c\nd\n'},
        message=(
            "spec.dataset.files: row 1, counted from 0 (line 4 of x.csv) has 1 fields, and the header has 2 (text,"
            " label). A line break in a cell needs"
        ),
    ),
    RefusedCase(
        name="a quoted word that begins a cell",
        files={"x.csv": 'text,label\na,b\n"Hello" he said,c\n'},
        message=(
            "spec.dataset.files: row 1, counted from 0 (line 3 of x.csv) cannot be read as csv: a cell that begins with"
            " a quotation mark has more text after its closing one."
        ),
    ),
    RefusedCase(
        name="doubled and escaped quotation marks in one file",
        files={"x.csv": 'text,label\n"a \\"b\\"",c\n"a ""b""",c\n'},
        message="spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) cannot be read as csv",
    ),
    RefusedCase(
        name="two readings",
        files={"x.csv": 'text,label\nsay \\"hi\\",c\n'},
        message=(
            'spec.dataset.files: x.csv can be read in two ways: row 0, counted from 0, is "say \\"hi\\"", "c" with'
            ' quotation marks that are doubled, and "say "hi"", "c"'
        ),
    ),
    RefusedCase(
        name="semicolons",
        files={"x.csv": "text;label\na, b;c\n"},
        message=(
            "spec.dataset.files: row 0, counted from 0 (line 2 of x.csv) has 2 fields, and the header has 1"
            " (text;label). The only column is called 'text;label'. If its cells are separated by semicolon, set"
            " spec.dataset.csv.separator to semicolon"
        ),
    ),
    RefusedCase(
        name="a column twice",
        files={"x.csv": "text,label,text\na,b,c\n"},
        message='spec.dataset.files: x.csv has 2 columns that are called "text". Rename all but one',
    ),
    RefusedCase(
        name="the second of two files",
        files={"x.csv": "text,label\na,b\n", "y.csv": "text,intent\na,b\n"},
        message='spec.dataset.files: y.csv has no column "label" (columns: text, intent), and x.csv has one',
    ),
    RefusedCase(
        name="the first of two files",
        files={"x.csv": "body,label\na,b\n", "y.csv": "text,label\na,b\n"},
        message='spec.dataset.files: x.csv has no column "text" (columns: body, label), and y.csv has one',
    ),
    RefusedCase(
        name="cp1252",
        files={"x.csv": "text,label\na,b\nit’s,c\n".encode("cp1252")},
        message=(
            "spec.dataset.files: x.csv is not UTF-8: byte 0x92 at position 17 (line 3) is not valid. Set"
            " spec.dataset.encoding to the encoding that the file was written in, such as cp1252, where that byte"
            ' is "’"'
        ),
    ),
    RefusedCase(
        name="latin-1 JSON lines",
        files={"x.jsonl": '{"text": "ä"}\n'.encode("latin-1")},
        message="spec.dataset.files: x.jsonl is not UTF-8: byte 0xe4 at position 10 (line 1)",
    ),
    RefusedCase(
        name="UTF-16 without a mark",
        files={"x.jsonl": '{"text": "a"}\n'.encode("utf-16-le")},
        message="spec.dataset.files: x.jsonl holds NUL bytes (the first at position 1), as UTF-16",
    ),
    RefusedCase(
        name="an encoding against the mark",
        files={"x.csv": "\ufefftext,label\na,b\n"},
        dataset={"encoding": "cp1252"},
        message=(
            "spec.dataset.files: x.csv begins with the byte order mark of UTF-8, but spec.dataset.encoding is cp1252."
            " Remove encoding, or the mark"
        ),
    ),
    RefusedCase(
        name="an encoding that does not exist",
        files={"x.csv": "text,label\na,b\n"},
        dataset={"encoding": "cp99"},
        message="spec.dataset.encoding: Python has no text encoding 'cp99'",
    ),
    RefusedCase(
        name="an encoding of Parquet",
        files={"x.parquet": b"PAR1"},
        dataset={"encoding": "cp1252"},
        message="spec.dataset.encoding: parquet is no format of text, and has no encoding",
    ),
    RefusedCase(
        name="how CSV is written, for JSON",
        files={"x.jsonl": "{}"},
        dataset={"csv": {"separator": "tab"}},
        message="spec.dataset.csv: belongs to files of the format csv, and x.jsonl is read as json",
    ),
    RefusedCase(
        name="a file cut short",
        files={"x.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 99)[:-9]},
        message="spec.dataset.files: x.jsonl.gz cannot be decompressed: Compressed file ended",
    ),
    RefusedCase(
        name="zstd cut short",
        files={"x.jsonl.zst": pyarrow.compress(b'{"text": "a"}\n' * 99, "zstd", asbytes=True)[:-9]},
        message="spec.dataset.files: x.jsonl.zst cannot be decompressed: Truncated compressed stream",
    ),
    RefusedCase(
        name="broken JSON",
        files={"x.jsonl": '{"text": "a"}\n{"text": \n'},
        message="spec.dataset.files: x.jsonl cannot be read as json: line 2, column 9: Expecting value.",
    ),
    RefusedCase(
        name="a list that does not end",
        files={"x.json": '[{"text": "a"},\n{"text": "b"}'},
        message="spec.dataset.files: x.json cannot be read as json: the list that begins the file has no end",
    ),
    RefusedCase(
        name="something after the list",
        files={"x.json": '[{"text": "a"}]\n[]'},
        message="spec.dataset.files: x.json cannot be read as json: line 1: something follows the end of the list",
    ),
    RefusedCase(
        name="no objects",
        files={"x.json": '[{"text": "a"},\n["b"]]'},
        message=(
            "spec.dataset.files: x.json cannot be read as json: row 1, counted from 0 (line 2), is no object but of"
            " kind: lists"
        ),
    ),
    RefusedCase(
        name="a key twice",
        files={"x.jsonl": '{"text": "a", "text": "b"}\n'},
        message=(
            'spec.dataset.files: x.jsonl cannot be read as json: line 1: an object has the key "text" more than once'
        ),
    ),
    RefusedCase(
        name="half a character",
        files={"x.jsonl": '{"text": "\\ud83d"}\n'},
        message="spec.dataset.files: x.jsonl has half a surrogate pair",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_files_that_are_refused(case: RefusedCase, tmp_path: Path) -> None:
    assert refusal(tmp_path, case.files, **case.dataset)[: len(case.message)] == case.message


@dataclass(frozen=True)
class NoticedCase:
    name: str
    file: str
    content: str | bytes
    notice: str | None  # its beginning


NOTICED = [
    NoticedCase(
        name="backslashes",
        file="x.csv",
        content='text,label\n"a \\"b\\"",c\n',
        notice=(
            'spec.dataset.csv.quoting: the quotation marks in the cells of x.csv stand after backslashes (\\"), and are'
            " read so, as with quoting: backslash"
        ),
    ),
    NoticedCase(
        name="rows of several lines",
        file="x.csv",
        content='text,label\na,b\n"c\nd",e\n',
        notice=(
            "spec.dataset.files: 1 of 2 rows of x.csv span several lines (the first: row 1, counted from 0, line 3). If"
            " quotation marks are ordinary characters there, set"
        ),
    ),
    NoticedCase(
        name="cells between quotation marks in TSV",
        file="x.tsv",
        content='text\tlabel\n"a ""b"""\tc\n',
        notice="spec.dataset.csv.quoting: 1 cells of x.tsv begin and end with a quotation mark",
    ),
    NoticedCase(
        name="UTF-16",
        file="x.csv",
        content="text,label\na,b\n".encode(UTF16),
        notice="spec.dataset.files: x.csv is read as UTF-16, by its byte order mark",
    ),
    NoticedCase(
        name="joined files",
        file="x.jsonl",
        content='\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n',
        notice="spec.dataset.files: x.jsonl has byte order marks at the beginning of 1 lines",
    ),
    NoticedCase(
        name="blank lines",
        file="x.txt",
        content="a\n\n \nb\n\n",
        notice="spec.dataset.files: 2 blank lines of x.txt are left out, and are no rows",
    ),
    NoticedCase(
        name="an ordinary file",
        file="x.csv",
        content="\ufefftext,label\na,b\n\n",
        notice=None,
    ),
]


@pytest.mark.parametrize("case", NOTICED, ids=lambda case: case.name)
def test_what_is_chosen_is_noticed(case: NoticedCase, tmp_path: Path) -> None:
    load(tmp_path, {case.file: case.content})
    assert [given[: len(case.notice or "")] for given in notices.given()] == ([case.notice] if case.notice else [])


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


@dataclass(frozen=True)
class LateCase:
    name: str
    early: str
    late: str


LATE = [
    # a column that the job does not use, and that changes after more rows than are looked at first
    LateCase(
        name="x.csv",
        early="text,label,other\n" + "a,b,1\n" * 30_000,
        late="a,b,not a number\n",
    ),
    LateCase(
        name="x.jsonl",
        early='{"text": "a", "label": "b", "other": 1}\n' * 30_000,
        late='{"text": "a", "label": "b", "other": {"not": ["a number"]}}\n',
    ),
]


@pytest.mark.parametrize("case", LATE, ids=lambda case: case.name)
def test_a_column_that_the_job_does_not_use_does_not_stop_it(case: LateCase, tmp_path: Path) -> None:
    assert len(load(tmp_path, {case.name: case.early + case.late}).data) == 30_001


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


@dataclass(frozen=True)
class PlaceCase:
    name: str
    files: dict[str, str | bytes]
    row: int
    location: str


PLACES = [
    PlaceCase(
        name="blank lines and cells of several lines",
        files={"x.csv": '\ntext,label\n\n"a\nb",c\n\nd,e\n'},
        row=1,
        location="row 1, counted from 0 (line 7 of x.csv)",
    ),
    PlaceCase(
        name="the second file",
        files={"x.csv": "text,label\na,b\n", "y.csv": "label,text\nc,d\ne,f\n"},
        row=2,
        location="row 2, counted from 0 (line 3 of y.csv)",
    ),
    PlaceCase(
        name="JSON lines",
        files={"x.jsonl": '\n{"text": "a"}\n\n{"text": "b"}\n'},
        row=1,
        location="row 1, counted from 0 (line 4 of x.jsonl)",
    ),
    PlaceCase(
        name="a list",
        files={"x.json": '[{"text":\n "a"},\n\n{"text": "b"}]'},
        row=1,
        location="row 1, counted from 0 (line 4 of x.json)",
    ),
    PlaceCase(
        name="text",
        files={"x.txt": "a\n\nb\n"},
        row=1,
        location="row 1, counted from 0 (line 3 of x.txt)",
    ),
]


@pytest.mark.parametrize("case", PLACES, ids=lambda case: case.name)
def test_a_row_has_a_number_and_a_line(case: PlaceCase, tmp_path: Path) -> None:
    rows = load(tmp_path, case.files)
    assert rows.place(case.row) == case.location
    assert rows.select(numpy.array([case.row])).place(0) == case.location, (
        "a row keeps its number when others are left out"
    )


def test_slices_keep_the_numbers_of_rows(tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "{i}"}}\n' for i in range(10))
    assert (
        load(tmp_path, {"x.jsonl": lines}, split="train[2:4]+train[7:]").place(2)
        == "row 7, counted from 0 (line 8 of x.jsonl)"
    )


@dataclass(frozen=True)
class DescribedCase:
    name: str
    tables: dict[str, str]  # in the folder
    expect: list[tuple[str, str]] | str  # image and label of each row, or how the message begins


DESCRIBED = [
    DescribedCase(
        name="labels that look like numbers",
        tables={"metadata.csv": "file_name,label\na/1.png,007\nb/2.png,7\n"},
        expect=[("a/1.png", "007"), ("b/2.png", "7")],
    ),
    DescribedCase(
        name="a table in each folder",
        tables={
            "a/metadata.jsonl": '{"file_name": "1.png", "label": "x"}',
            "b/metadata.jsonl": '{"file_name": "../b/2.png", "label": "y"}',
        },
        expect=[("a/1.png", "x"), ("b/2.png", "y")],
    ),
    DescribedCase(
        name="an unquoted comma",
        tables={"metadata.csv": "file_name,label\na/1.png,b, c\n"},
        expect="spec.dataset.files: row 0, counted from 0 (line 2 of pets/metadata.csv) has 3 fields",
    ),
    DescribedCase(
        name="an image that is not there",
        tables={"metadata.csv": "file_name,label\na/1.png,b\na/3.png,b\n"},
        expect=(
            'spec.dataset.files: row 1, counted from 0 (line 3 of metadata.csv): pets has no image "a/3.png". Correct'
            " file_name, or add the image"
        ),
    ),
    DescribedCase(
        name="no name of a file",
        tables={"metadata.csv": "file,label\na/1.png,b\n"},
        expect='spec.dataset.files: metadata.csv has no column "file_name" of text, which names the image',
    ),
]


@pytest.mark.parametrize("case", DESCRIBED, ids=lambda case: case.name)
def test_tables_beside_images(case: DescribedCase, tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for path in ("a/1.png", "b/2.png"):
        (folder / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / path)
    for path, content in case.tables.items():
        (folder / path).write_text(content)
    source = TrainingData.model_validate({"files": [str(folder)], "format": "imagefolder"})
    loader = Loader(source, "spec.dataset", tmp_path / "cache", columns=("image", "label"), others=False)
    if isinstance(case.expect, str):
        with pytest.raises(Failure) as failure:
            loader.split("train", "split")
        assert failure.value.message.replace(f"{tmp_path}/", "").startswith(case.expect)
        return
    rows = loader.split("train", "split").data
    paths = [image["path"] for image in rows.cast_column("image", datasets.Image(decode=False))["image"]]
    assert list(zip([str(Path(path).relative_to(folder)) for path in paths], rows["label"], strict=True)) == case.expect
