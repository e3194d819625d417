"""Finds the local files that a dataset field names: their format, and the images in a folder.

Also checks that files for training and for evaluation are different, and that the same files still exist.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from luthier_api.exitcodes import ExitCode
from luthier_api.formats import FORMATS
from luthier_api.run import Origin
from luthier_api.spec import DatasetSource
from luthier_trainer.data.remote import is_remote
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import provenance
from luthier_trainer.workspace.system_folders import refuse_system_file

FORMAT_OF_SUFFIX: dict[str, str] = {suffix: name for name, info in FORMATS.items() for suffix in info.suffixes}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
READ_AS: dict[str, str] = {name: info.read_as or name for name, info in FORMATS.items()}
"""Format → the format whose reader reads it."""
FOREIGN = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a workbook, which is not read; save it as CSV"),
    **dict.fromkeys(
        (".pdf", ".docx", ".doc", ".odt", ".html", ".htm", ".epub"),
        "a document, which is not read; write its text into a file of text, or of JSON lines",
    ),
    **dict.fromkeys((".zip", ".7z", ".rar"), "an archive, which is not read; unpack it"),
    ".tgz": "a compressed archive, which is not read; unpack it, or decompress it if it is one of WebDataset",
    **dict.fromkeys(
        PICTURES := (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        "an image; name its folder, and set {place}.format: imagefolder",
    ),
}
"""Suffixes of files that are often taken for data → what they are, and what to do."""
LOOKED_AT = 10_000  # files of a folder, for a hint
TEXTUAL = {name for name, info in FORMATS.items() if info.text}

METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # tables beside images, as in `datasets`
# Suffixes of files that are not read but were probably meant to be data. If they were left out, a class would be
# smaller, or missing.
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
}
ARCHIVES = {".tar", ".tgz", ".zip", ".7z", ".rar"}


@dataclass(frozen=True)
class ImageFolder:
    """The files in a folder of images, except hidden files."""

    path: Path
    images: list[Path]
    tables: list[Path]
    """Tables of metadata. If there are any, the columns are theirs, and folders are not classes."""

    def classes(self, field: str) -> list[str]:
        """Return the class of each image, in the order of `images`.

        The class is the name of the folder between this folder and the image, or of this folder if all images are
        directly in it. Raises Failure if an image is in any other folder.
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
    """Return the images and tables in the folder, in the order of their names.

    Files that are left out are printed. Raises Failure for files that would otherwise be missing from the data without
    notice: images of formats that are not read, archives, and links to folders.
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
    if unread := [file for file in others if file.suffix.lower() in IMAGES_OF_OTHERS | ARCHIVES]:
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
    """Return whether a file or folder is hidden, or one that an operating system creates."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _raise(error: OSError) -> None:
    """Raise the error of `os.walk`, which would otherwise skip what it cannot read without notice."""
    raise error


def find_files(
    patterns: list[str], field: str, folders: bool = False, downloads: Mapping[str, list[Path]] | None = None
) -> list[Path]:
    """Return the files (or `folders`) that `patterns` name, each of them once.

    They are in the order of the patterns, and sorted within each pattern. `downloads`: address → the files that it
    stands for. Raises Failure if a pattern finds nothing.
    """
    every: dict[Path, Path] = {}
    for i, pattern in enumerate(patterns):
        path = Path(pattern)
        if downloads and pattern in downloads:
            found = downloads[pattern]
        elif path.exists():
            found = [path]
        elif any(c in pattern for c in "*?["):
            anchor = Path(path.anchor or ".")
            found = sorted(anchor.glob(str(path.relative_to(path.anchor))))
        else:
            found = []
        if not folders:
            found = [file for path in found for file in saved_files(path, f"{field}[{i}]")]
        matching = [p for p in found if p.is_dir() == folders]
        if not matching:
            kind, hint = ("folder" if folders else "file"), ""
            if found and folders:
                hint = ". It is a file"
            elif found:
                hint = f". It is a folder: {_of_folder(found[0], field.rpartition('.')[0])}"
            elif near := _near(path):
                hint = f". Did you mean {near!r}?"
            else:
                hint = ". Is its volume listed under spec.volumes?"
            raise Failure(ExitCode.NOT_FOUND, f"{field}[{i}]: there is no {kind} {pattern}{hint}")
        for path in matching:
            refuse_system_file(path, f"{field}[{i}]")
            if "::" in str(path):
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f'{field}[{i}]: {path} has "::" in its name, which the library that reads it takes for a file'
                    " inside an archive; rename it",
                )
            every.setdefault(path.resolve(), path)
    return list(every.values())


def saved_files(path: Path, field: str) -> list[Path]:
    """Return the Arrow files of a folder that `datasets` has written (`save_to_disk`); of all other paths, themselves.

    Raises Failure for a folder of several splits, or with a file missing.
    """
    splits, state = path / "dataset_dict.json", path / "state.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_bytes())["splits"]
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {path} holds the splits {', '.join(names)}. Name one of them, such as {path / names[0]};"
                " others can be evalFiles",
            )
        if not state.is_file():
            return [path]
        files = [path / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Failure(
            ExitCode.INVALID_DATASET,
            f"{field}: {path} looks like a folder of save_to_disk, but {type(error).__name__}: {error} in its"
            " description. Copy it again, or name its .arrow files",
        ) from None
    if missing := [file.name for file in files if not file.is_file()]:
        raise Failure(
            ExitCode.INVALID_DATASET,
            f"{field}: {path} lacks {missing[0]}, which its state.json names. It may not be copied whole: copy it"
            " again",
        )
    return files


def _of_folder(path: Path, place: str) -> str:
    """Return how to name the files of a folder. `place` is the field of the dataset."""
    files = [file for file in itertools.islice(path.rglob("*"), LOOKED_AT) if file.is_file()]
    if any(suffix_of(file) in PICTURES for file in files):
        return f"to read the images in it, set {place}.format: imagefolder"
    known = [file for file in files if suffix_of(file) in FORMAT_OF_SUFFIX]
    if known:
        # A folder of `datasets` has Arrow files, and describes them in JSON.
        example = min(known, key=lambda file: (suffix_of(file) != ".arrow", len(file.parts), file))
        if suffix_of(example) == ".arrow":
            return f"name its files, for example, of a cache of `datasets`, {example.parent}/*-train*.arrow"
        ending = [suffix for suffix in example.suffixes if suffix.lower() in {suffix_of(example), *COMPRESSED}]
        return f"name its files, for example {example.parent}/*{''.join(ending)}"
    return "it has no file of a known format" if files else "it is empty"


def _near(path: Path) -> str | None:
    """Return the path in the same folder whose name is the most similar, if there is one."""
    with contextlib.suppress(OSError):
        for name in difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1):
            return str(path.parent / name)
    return None


def format_of(paths: list[Path], field: str) -> str:
    """Return the format of files from their suffixes. Raises Failure if it is unknown, or not the same for all."""
    place = field.rpartition(".")[0]
    found: dict[str, Path] = {}
    for path in paths:
        kind = FORMAT_OF_SUFFIX.get(suffix_of(path))
        if kind is None:
            if advice := FOREIGN.get(suffix_of(path)):
                raise Failure(ExitCode.INVALID_DATASET, f"{field}: {path.name} is {advice.format(place=place)}")
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{place}.format: cannot be determined from {path.name}; set it to one of {', '.join(FORMATS)}",
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
    """Return the suffix that shows the format: in lower case, and without the suffix of a compression."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def refuse_shared(learnt: Iterable[Origin], measured: Iterable[Origin]) -> None:
    """Check that no file is used both for training and for evaluation.

    Rows that a model was trained on make every metric look better than it is. A copy, a link, and a folder inside of
    another one count as the same file. Raises Failure if there is such a file.
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
    """Check that `patterns` still find the files that were read. Raises Failure if they find others.

    If a pattern finds nothing, this is accepted: the data was read already, and may have been removed since. Addresses
    are not asked again.
    """
    before = {origin.path for origin in recorded if origin.field == field and not is_remote(origin.path)}
    try:
        local = [pattern for pattern in patterns if not is_remote(pattern)]
        found = {str(p) for p in find_files(local, field, folders=source.format == "imagefolder")}
    except Failure:
        return
    if before and (other := sorted(found ^ before)):
        raise provenance.changed(field, f"{other[0]} has {'come' if other[0] in found else 'gone'}")
