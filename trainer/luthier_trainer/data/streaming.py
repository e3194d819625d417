"""Rows that are read while the model learns (`dataset.streaming`): where they are, and one window after the other.

The files are read again and again, each time (a lap) in another order if they are shuffled. Nothing of them is written
into the workspace, but the files that are being downloaded (`data.shards`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from luthier_api.dataset import TrainingData
from luthier_api.exitcodes import ExitCode
from luthier_api.run import Stream
from luthier_api.spec import Csv
from luthier_trainer.data import remote
from luthier_trainer.data.decoding import Decoder
from luthier_trainer.data.files import READ_AS, find_files, format_of
from luthier_trainer.data.hubrows import plain_files
from luthier_trainer.data.load import Loader, Rows, no_split
from luthier_trainer.data.shards import Shards
from luthier_trainer.data.windows import PIECES, WindowedFile
from luthier_trainer.models.hub import endpoint, hub_api, patiently
from luthier_trainer.runtime.failure import Failure

STREAMING = "spec.dataset.streaming"
DATASET = "spec.dataset"
SCHEMES = ("http", "https")  # pods of `run` get no credentials for others


@dataclass(frozen=True)
class Source:
    """The files of a split, before any of their rows was read."""

    files: list[str]
    """Paths inside the pods, or addresses."""
    field: str
    """The path in the spec that names them."""
    format: str
    csv: Csv
    encoding: str | None = None
    revision: str | None = None
    """The commit of a dataset on the Hub."""

    def stream(self, form: str = "") -> Stream:
        """Return what the pods of `run` need of it."""
        csv = None if self.csv == Csv() else self.csv
        files = [remote.without_query(name) for name in self.files]
        return Stream(files=files, format=self.format, csv=csv, encoding=self.encoding, form=form)


@dataclass(frozen=True)
class Place:
    """Where a window begins."""

    lap: int = 0
    file: int = 0
    """Its position in the order of the lap."""
    row: int = 0
    """Its first row, by the number that it has in the file."""


@dataclass(frozen=True)
class RowStream:
    """The rows of a stream, window by window, without an end."""

    stream: Stream
    shards: Shards
    columns: tuple[str, ...]
    seed: int | None = None
    """By which the order of the files is drawn for each lap; None: always the order in which they are named."""

    def windows(self, place: Place) -> Iterator[tuple[Place, Rows]]:
        """Yield (where it begins, its rows) of the windows from `place` on. Raises Failure at a row that is none."""
        while True:
            order, nothing = self._order(place.lap), place == Place(place.lap)
            for position in range(place.file, len(order)):
                number = order[position]
                first = self.stream.begin_row if number == self.stream.begin_file else 0
                with self.shards.open(number) as path:
                    for rows in self._file(path).windows(max(first, place.row)):
                        assert rows.numbers is not None
                        nothing = False
                        yield Place(place.lap, position, int(rows.numbers[0])), rows
                place = Place(place.lap, position + 1)
            if nothing:
                raise Failure(ExitCode.INVALID_DATASET, f"{self.shards.field}: there are no rows")
            place = Place(place.lap + 1)

    def first_lap(self) -> Generator[Rows, None, None]:
        """Yield the windows of all files once."""
        for place, rows in self.windows(Place()):
            if place.lap:
                return
            yield rows

    def place_of(self, row: int) -> tuple[int, int] | None:
        """Return (number of the file, number of the row in it) of row `row` of all files; None if there are fewer."""
        for number in range(len(self.shards.files)):
            before = 0
            with self.shards.open(number) as path:
                for count in self._file(path).counts():
                    if row < before + count:
                        return number, row
                    before += count
            row -= before
        return None

    def _order(self, lap: int) -> list[int]:
        numbers = list(range(self.stream.begin_file, len(self.shards.files)))
        if self.seed is None:
            return numbers
        import numpy

        return [numbers[i] for i in numpy.random.default_rng([self.seed, lap, 1]).permutation(len(numbers))]

    def _file(self, path: Path) -> WindowedFile:
        decoder = Decoder(self.stream.encoding, DATASET, self.shards.field)
        return WindowedFile(path, self.stream.format, decoder, self.stream.csv or Csv(), self.columns)


def find(source: TrainingData, split: str, field: str, cache: Path) -> Source:
    """Return where the rows of a split are. `field`: of the dataset, which names the split.

    Raises Failure if there are none, or if the pods of `run` could not read them.
    """
    return _on_hub(source, split, field, cache) if source.files is None else _of_files(source, source.files)


def _of_files(source: TrainingData, names: list[str]) -> Source:
    """Return the files that are named by paths or by addresses. Raises Failure if there are none."""
    where = f"{DATASET}.files"
    found: list[str] = []
    for i, name in enumerate(names):
        if not remote.is_remote(name):
            found += [str(path) for path in find_files([name], where)]
            continue
        scheme = urlsplit(name).scheme
        if scheme not in SCHEMES:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{where}[{i}]: with streaming, the pods of `run` read the files, and have no credentials for"
                f" {scheme}://. Name an https address, such as a signed one, copy the files to a volume, or remove"
                " streaming",
            )
        found.append(name)
    found = list(dict.fromkeys(found))
    kind = source.format or format_of([_named(name) for name in found], where)
    return _checked(source, Source(found, where, READ_AS[kind], source.csv or Csv(), source.encoding), kind)


def _named(file: str) -> Path:
    return Path(urlsplit(file).path if remote.is_remote(file) else file)


def _on_hub(source: TrainingData, split: str, field: str, cache: Path) -> Source:
    """Return the files of a split on the Hub, by their addresses. Raises Failure."""
    name, api, where = str(source.id), hub_api(), f"{DATASET}.id"
    what = f"dataset {name}"
    info = patiently(lambda: api.dataset_info(name, revision=source.revision), where, what)
    if info.private or info.gated:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{STREAMING}: {name} is {'private' if info.private else 'gated'}. With streaming, the pods of `run` read"
            " the rows, and they get no token of the Hub. Remove streaming, or copy the files to a volume and name them"
            f" in {DATASET}.files",
        )

    def files() -> Source:
        """Ask the Hub. Raises Failure for a dataset that cannot be streamed."""
        from datasets import load_dataset_builder

        builder = load_dataset_builder(
            name, source.name, revision=info.sha, cache_dir=str(cache), token=api.token or None
        )
        found = plain_files(builder, name, PIECES)
        if found is None:
            raise Failure(
                ExitCode.INVALID_DATASET,
                f"{STREAMING}: {name} is not made of files of {', '.join(PIECES)} that can be read as they are, and"
                " cannot be streamed. Remove streaming",
            )
        if split not in found.splits:
            raise no_split(split, list(found.splits), f"{DATASET}.{field}")
        base = f"{endpoint()}/datasets/{name}/resolve/{info.sha}"
        csv = found.csv if source.csv is None else found.csv.model_copy(update=source.csv.model_dump(exclude_none=True))
        addresses = [f"{base}/{quote(path)}" for path in found.splits[split]]
        return Source(addresses, where, found.kind, csv, source.encoding or found.encoding, info.sha)

    try:
        return _checked(source, patiently(files, where, what), None)
    except ValueError as error:
        text = " ".join(str(error).split())[:300]
        raise Failure(ExitCode.INVALID_SPEC, f"{DATASET}.name: {text}") from error


def _checked(source: TrainingData, found: Source, kind: str | None) -> Source:
    """Return `found`. Raises Failure if the spec has settings for other files, or if such files are not streamed."""
    Loader(source, DATASET, Path()).check_settings(kind or found.format, _named(found.files[0]).name)
    if found.format not in PIECES:
        raise Failure(
            ExitCode.INVALID_SPEC, f"{STREAMING}: files of the format {found.format} are not streamed. Remove streaming"
        )
    return found
