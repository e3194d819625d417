"""Which local files a dataset field names, what format they have, which images are in a folder, and whether the same
ones are still there.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

from luthier_api.exitcodes import ExitCode
from luthier_api.formats import FORMATS
from luthier_api.run import Origin
from luthier_api.spec import DatasetSource
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import provenance

FORMAT_OF_SUFFIX: dict[str, str] = {suffix: name for name, info in FORMATS.items() for suffix in info.suffixes}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
READ_AS: dict[str, str] = {name: info.read_as or name for name, info in FORMATS.items()}
"""Format → the one whose reader reads it."""
TEXTUAL = {name for name, info in FORMATS.items() if info.text}

METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # tables beside images, as `datasets` knows them
# What cannot be read and surely was meant to be: left out, a class would be the smaller for it, or gone.
IMAGES_OF_OTHERS = {
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".dcm",
    ".dng",
    ".nef",
    ".cr2",
    ".arw",
    ".npy",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".rar",
}


@dataclass(frozen=True)
class ImageFolder:
    """What lies in a folder of images, hidden files aside."""

    path: Path
    images: list[Path]
    tables: list[Path]
    """Metadata: with them, the columns are theirs, and a folder is no class."""

    def classes(self, field: str) -> list[str]:
        """The class of each image: the one folder between; or this folder, where all lie directly in it. Raises
        Failure.
        """
        between = [image.relative_to(self.path).parts[:-1] for image in self.images]
        if not any(between):
            return [self.path.absolute().name] * len(between)
        for image, folders in zip(self.images, between, strict=True):
            if len(folders) != 1:
                hint = f". To take each folder of {self.path} for itself, write {self.path}/*" if folders else ""
                raise Failure(
                    ExitCode.INVALID_DATASET,
                    f"{field}: {image} lies in {'/'.join(folders) or 'no folder'} below {self.path}; an image lies in"
                    f" one folder, whose name is its class, as in {self.path}/CLASS/{image.name}{hint}",
                )
        return [folders[0] for folders in between]


def image_folder(path: Path, field: str) -> ImageFolder:
    """What lies in the folder, in the order of names; what is left out is said. Raises Failure for what would be
    missing unnoticed.
    """
    import PIL.Image

    PIL.Image.init()
    suffixes = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    images, tables, others = list[Path](), list[Path](), list[Path]()
    for place, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        if link := next((name for name in folders if Path(place, name).is_symlink()), None):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {place}/{link} is a link to a folder, which is not followed; put the folder itself there, or"
                " name it",
            )
        found = [Path(place, name) for name in sorted(names) if not _hidden(name)]
        images += [file for file in found if file.suffix.lower() in suffixes]
        tables += [file for file in found if file.name in METADATA]
        others += [file for file in found if file.suffix.lower() not in suffixes and file.name not in METADATA]
        if not (found or folders):
            print(f"{field}: {place} is empty, and no class", flush=True)
    if unread := [file for file in others if file.suffix.lower() in IMAGES_OF_OTHERS]:
        raise Failure(
            ExitCode.INVALID_DATASET,
            f"{field}: {len(unread)} files of {path} are of a format that is not read here (the first: {unread[0]})."
            " Convert them to JPEG or PNG, unpack them, or remove them",
        )
    if others:
        kinds = ", ".join(
            f"{n} {suffix or 'without suffix'}" for suffix, n in Counter(file.suffix for file in others).most_common()
        )
        print(
            f"{field}: {len(others)} files of {path} are no images by their suffix, and are left out ({kinds})",
            flush=True,
        )
    if not images:
        raise Failure(ExitCode.INVALID_DATASET, f"{field}: there are no images in {path}")
    return ImageFolder(path, images, tables)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _raise(error: OSError) -> None:
    """Raise an error that `os.walk` would leave out."""
    raise error  # os.walk would leave out, without a word, what it may not read


def find_files(patterns: list[str], field: str, folders: bool = False) -> list[Path]:
    """The files (or folders) that `patterns` name, each once, each pattern's sorted. Raises Failure for a pattern that
    finds nothing.
    """
    every: dict[Path, Path] = {}
    for i, pattern in enumerate(patterns):
        path = Path(pattern)
        if path.exists():
            found = [path]
        elif any(c in pattern for c in "*?["):
            anchor = Path(path.anchor or ".")
            found = sorted(anchor.glob(str(path.relative_to(path.anchor))))
        else:
            found = []
        matching = [p for p in found if p.is_dir() == folders]
        if not matching:
            kind, hint = ("folder" if folders else "file"), ""
            if found:
                hint = (
                    ". It is a file"
                    if folders
                    else (
                        ". It is a folder: name its files, for example with /*.jsonl, or set format: imagefolder for"
                        " one of images"
                    )
                )
            elif near := _near(path):
                hint = f". Did you mean {near!r}?"
            else:
                hint = ". Is its volume listed under spec.volumes?"
            raise Failure(ExitCode.NOT_FOUND, f"{field}[{i}]: there is no {kind} {pattern}{hint}")
        for path in matching:
            if "::" in str(path):
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f'{field}[{i}]: {path} has "::" in its name, which the library that reads it takes for a file'
                    " inside an archive; rename it",
                )
            every.setdefault(path.resolve(), path)
    return list(every.values())


def _near(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        for name in difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1):
            return str(path.parent / name)
    return None


def format_of(paths: list[Path], field: str) -> str:
    """Format of files, told by their suffixes, which must agree. Raises Failure if they do not."""
    place = field.rpartition(".")[0]
    found: dict[str, Path] = {}
    for path in paths:
        kind = FORMAT_OF_SUFFIX.get(suffix_of(path))
        if kind is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{place}.format: cannot be told from {path.name}; set it to one of {', '.join(FORMATS)}",
            )
        found.setdefault(READ_AS[kind], path)
    if len(found) > 1:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: files of several formats ({', '.join(p.name for p in found.values())}); use one format, or set"
            f" {place}.format",
        )
    return next(iter(found))


def suffix_of(path: PurePath) -> str:
    """The suffix that tells the format: in small letters, without that of a compression."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def refuse_shared(learnt: Iterable[Origin], measured: Iterable[Origin]) -> None:
    """Rows that are both learnt and measured on make every figure look better than it is. A copy, a link or a folder
    inside is no other. Raises Failure for a file of both.
    """
    learnt = list(learnt)
    by_content = {origin.digest: origin for origin in learnt}
    for origin in measured:
        if same := by_content.get(origin.digest):
            what = (
                f"is one of {same.field} too"
                if same.path == origin.path
                else f"holds the same as {same.path} of {same.field}"
            )
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{origin.field}: {origin.path} {what}, and would be learnt and measured on. Name other files, or hold"
                " rows out with evalFraction",
            )
        place = Path(origin.path).resolve()
        for other in learnt:
            whole = Path(other.path).resolve()
            if place.is_relative_to(whole) or whole.is_relative_to(place):
                inside, outer = (origin, other) if place.is_relative_to(whole) else (other, origin)
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"{origin.field}: {inside.path} lies in {outer.path} of {outer.field}, and its images would be"
                    " learnt and measured on. Name folders that are apart, or hold rows out with evalFraction",
                )


def refuse_other_files(recorded: list[Origin], source: DatasetSource, patterns: list[str], field: str) -> None:
    """Raise Failure when `patterns` find other files than were read. When one of them finds nothing, the data has done
    its part and gone.
    """
    before = {origin.path for origin in recorded if origin.field == field}
    try:
        found = {str(p) for p in find_files(patterns, field, folders=source.format == "imagefolder")}
    except Failure:
        return
    if before and (other := sorted(found ^ before)):
        raise provenance.changed(field, f"{other[0]} has {'come' if other[0] in found else 'gone'}")
