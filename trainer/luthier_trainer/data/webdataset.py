"""Finds the samples in archives of the format WebDataset: tar files whose members are the cells of rows.

Members with the same name up to the first dot of the file name are one sample, and the rest of the name is the column.
`datasets` (5.2) reads such archives too, but without notice it stops at a damaged header, does not see that the end is
missing, and leaves out members. So the archives are read here, by `tarfile`, and every byte after the members as well.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.data.jsonrows import DECODE
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
LABEL, TEXT, JSON = "cls", "txt", "json"
AT_ONCE = 1000  # samples of a batch
BYTES_AT_ONCE = 1 << 26  # of a batch
CHUNK = 1 << 20  # bytes
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
AGAIN = "Copy the archive again, or write it again"


@dataclass(frozen=True)
class Member:
    """Where the content of a member begins in the archive, and its size in bytes."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Sample:
    """The members of a row, by column."""

    key: str
    members: Mapping[str, Member]


@dataclass(frozen=True)
class Archive:
    """An archive that a field of the spec names."""

    path: Path
    field: str

    @cached_property
    def samples(self) -> list[Sample]:
        """The samples, in the order of their first members.

        Members that are in no sample are counted in a notice. Raises Failure if the archive is damaged or empty, or if
        a sample has two members of one column.
        """
        found: dict[str, dict[str, Member]] = {}
        others: list[str] = []
        for info in self._members():
            name = info.name.removeprefix("./")
            if info.isdir():
                continue
            if not info.isfile() or info.issparse():
                raise self._refusal(
                    f"its member {name} is no regular file. Write the archive again with the content of each file;"
                    " GNU tar does so with --dereference and --hard-dereference"
                )
            folder, slash, base = name.rpartition("/")
            stem, _, column = base.partition(".")
            if not stem or not column or folder.partition("/")[0] == "__MACOSX":
                others.append(name)
                continue
            members = found.setdefault(f"{folder}{slash}{stem}", {})
            if column.lower() in members:
                raise self._refusal(
                    f'the sample "{folder}{slash}{stem}" has two members "{column.lower()}" ({name}, and'
                    f" {members[column.lower()].name}). Two samples may have the same key: rename one, or remove it"
                )
            members[column.lower()] = Member(name, info.offset_data, info.size)
        if others:
            notice(
                f"{self.field}: {len(others)} members of {self.path.name} are in no sample, because their names do not"
                f" have the form KEY.COLUMN, and are left out. The first is {others[0]}"
            )
        if not found:
            raise self._refusal("it has no samples; the name of a member has the form KEY.COLUMN, as in 0001.jpg")
        return [Sample(key, members) for key, members in found.items()]

    def batches(self, columns: Sequence[str]) -> Iterator[list[tuple[Sample, dict[str, bytes]]]]:
        """Yield batches of (sample, the contents of its members in `columns`)."""
        batch: list[tuple[Sample, dict[str, bytes]]] = []
        size = 0
        with self.path.open("rb") as file:
            for sample in self.samples:
                cells = {name: _content(file, sample.members[name]) for name in columns if name in sample.members}
                batch.append((sample, cells))
                size += sum(map(len, cells.values()))
                if len(batch) == AT_ONCE or size >= BYTES_AT_ONCE:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def key_of(self, row: int) -> str:
        """Return the key of the sample of a row."""
        return self.samples[row].key

    def text(self, sample: Sample, column: str, content: bytes) -> str:
        """Return the text of a member. Raises Failure if it is none."""
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._unreadable(sample, column, f"is not UTF-8: {error.reason} at byte {error.start}") from None

    def fields(self, sample: Sample, content: bytes) -> dict[str, Any]:
        """Return the object in the JSON of a sample. Raises Failure if there is none."""
        try:
            value = DECODE(self.text(sample, JSON, content))
        except (ValueError, RecursionError) as error:
            raise self._unreadable(sample, JSON, f"cannot be read as JSON: {error}") from None
        if not isinstance(value, dict):
            raise self._unreadable(sample, JSON, "holds no JSON object, whose fields would be columns")
        return value

    def _unreadable(self, sample: Sample, column: str, what: str) -> Failure:
        return self._refusal(f'{sample.members[column].name} of the sample "{sample.key}" {what}. Correct or remove it')

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members. Raises Failure if the archive cannot be read up to its end."""
        with self.path.open("rb") as file:
            head = file.read(6)
            if compression := next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None):
                raise self._refusal(
                    f"it is compressed with {compression}, and archives are read only uncompressed. Decompress it:"
                    " images are compressed already"
                )
            file.seek(0)
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # they would fill the memory
                        yield member
                    end = archive.offset
            except (tarfile.TarError, UnicodeError) as error:
                raise self._refusal(f"it is no tar archive, damaged or truncated ({error}). {AGAIN}") from error
            self._check_end(file, end)

    def _check_end(self, file: IO[bytes], end: int) -> None:
        """Raise Failure if no end of an archive is at byte `end`, where `tarfile` has found no other member."""
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        if any(block):
            raise self._refusal(f"it is damaged: there is no valid header of a member at byte {end}. {AGAIN}")
        if len(block) < tarfile.BLOCKSIZE:
            raise self._refusal(f"it is truncated: the end of the archive is missing after byte {end}. {AGAIN}")
        while chunk := file.read(CHUNK):
            if any(chunk):
                raise self._refusal(
                    f"more follows the end of the archive at byte {end}, and would not be read. If several archives"
                    " were joined, name each by itself"
                )

    def _refusal(self, what: str) -> Failure:
        return Failure(ExitCode.INVALID_DATASET, f"{self.field}: {self.path} cannot be read as webdataset: {what}")


def _content(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


@dataclass(frozen=True)
class Layout:
    """The columns of archives, and the members that they are read from."""

    archives: Sequence[Archive]
    needed: Sequence[str]
    """Columns that the job can use."""
    sources: dict[str, tuple[str, ...]] = field(init=False)
    """Column → the members of which each sample has one. The fields of JSON are not among them."""

    def __post_init__(self) -> None:
        sources: dict[str, tuple[str, ...]] = {name: (name,) for name in self.counts if name != JSON}
        images = tuple(name for name in sources if name in IMAGES)
        # Photographs in one archive may be .jpg and .png, but of two images in a sample none is the image.
        alone = all(sum(name in sample.members for name in images) <= 1 for sample in self._samples)
        if images and alone:
            sources.setdefault("image", images)
        for role, name in (("label", LABEL), ("text", TEXT)):
            if name in sources:
                sources.setdefault(role, (name,))
        object.__setattr__(self, "sources", sources)

    @property
    def _samples(self) -> Iterator[Sample]:
        return (sample for archive in self.archives for sample in archive.samples)

    @cached_property
    def counts(self) -> Counter[str]:
        """Kind of member → the number of samples that have it."""
        return Counter(name for sample in self._samples for name in sample.members)

    @property
    def has_fields(self) -> bool:
        """Whether the JSON of the samples is to be read."""
        return JSON in self.counts and any(name not in self.sources for name in self.needed)

    @property
    def images(self) -> tuple[str, ...]:
        """All columns of images."""
        return tuple(name for name, members in self.sources.items() if members[0].rpartition(".")[2] in IMAGES)

    @property
    def texts(self) -> tuple[str, ...]:
        """All columns of text, without the fields of JSON."""
        return tuple(name for name in self.sources if name not in self.images)

    def check(self) -> None:
        """Check that each sample has what the job needs, and give notice of other members that some samples lack.

        Raises Failure if a sample lacks a member of a column that the job needs.
        """
        used = {name: self.sources[name] for name in self.needed if name in self.sources}
        if self.has_fields:
            used[JSON] = (JSON,)
        for name, members in used.items():
            if lacking := self._lacking(members):
                archive, key = lacking[0]
                kinds = " or ".join(members)
                raise Failure(
                    ExitCode.INVALID_DATASET,
                    f'{archive.field}: {len(lacking)} samples have no member "{kinds}" (column "{name}"), which others'
                    f' have. The first is "{key}" of {archive.path}. Add the member, or remove the sample',
                )
        read = {member for members in used.values() for member in members}
        images = self.sources.get("image", ())
        for name in self.counts:
            lacking = self._lacking(images if name in images else (name,))
            if lacking and name not in read:
                archive, key = lacking[0]
                notice(
                    f'{archive.field}: {len(lacking)} samples have no member "{name}", which others have, and which'
                    f' this job does not read. The first is "{key}" of {archive.path.name}'
                )

    def _lacking(self, members: Sequence[str]) -> list[tuple[Archive, str]]:
        """Return archive and key of the samples that have none of `members`."""
        return [
            (archive, sample.key)
            for archive in self.archives
            for sample in archive.samples
            if not any(name in sample.members for name in members)
        ]

    def batches(self, archive: Archive, images: bool) -> Iterator[tuple[list[dict[str, Any]], dict[str, list[Any]]]]:
        """Yield (texts and fields of each row, column of images → the images as `datasets` stores them), in batches.

        Only the columns that the job needs are read, and the images only with `images`. Raises Failure if a text is
        none.
        """
        texts = [name for name in self.texts if name in self.needed]
        pictures = [name for name in self.images if name in self.needed and images]
        read = {member for name in (*texts, *pictures) for member in self.sources[name]}
        for batch in archive.batches([*read, *([JSON] if self.has_fields else [])]):
            rows = [self._row(archive, sample, cells, texts) for sample, cells in batch]
            yield rows, {name: [self._image(*pair, name) for pair in batch] for name in pictures}

    def _row(
        self, archive: Archive, sample: Sample, cells: Mapping[str, bytes], texts: Sequence[str]
    ) -> dict[str, Any]:
        row = archive.fields(sample, cells[JSON]) if JSON in cells else {}
        row = {name: value for name, value in row.items() if name not in self.sources}
        for name in texts:
            (member,) = self.sources[name]
            text = archive.text(sample, member, cells[member])
            row[name] = text.strip() if member == LABEL else text
        return row

    def _image(self, sample: Sample, cells: Mapping[str, bytes], column: str) -> dict[str, Any]:
        (member,) = (name for name in self.sources[column] if name in cells)
        return {"bytes": cells[member], "path": sample.members[member].name}
