"""The weight files in a folder: which of them are loaded, what their headers describe, and whether they are complete.

Only headers are read, never a weight.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import PIPELINE_CONFIG, WEIGHTS_INDEX

# The names, without suffix, of the weight files that transformers, diffusers and PEFT load.
STEMS = (
    "model",
    "diffusion_pytorch_model",
    "adapter_model",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_BYTES = 1024  # a pointer file is smaller, by the specification of git-lfs
METADATA = "__metadata__"
FETCH_AGAIN = "Copy or download it again"
SHOWN = 3  # names in a message

# Names of tensors that describe a quantised weight: bitsandbytes' statistics, and the scales of FP8.
QUANT_STATE = re.compile(r"(?P<of>.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
BESIDE = re.compile(
    r"(?P<of>.+?)(\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|activation_scale|input_scale)|_scale|_scale_inv)"
)
QUANTISED = {"U8", "I8", "F8_E4M3", "F8_E5M2"}  # safetensors' names for the types of quantised weights


def check(folder: Path, field: str) -> None:
    """Check that the files that are loaded from `folder` exist and are complete.

    `folder` holds a model, an adapter or a pipeline. Raises Failure if files are absent, truncated, or pointers of
    git-lfs.
    """
    for part in {folder, *parts(folder)}:
        for path in sorted(p for p in part.iterdir() if p.is_file() and p.suffix != ".safetensors"):
            check_pointer(path, field)
    for part in parts(folder):
        for path in loaded(part, field):
            check_file(path, field)


def parts(folder: Path) -> list[Path]:
    """Return the folders that weights are loaded from: those of a pipeline's components, or `folder` itself."""
    if (folder / PIPELINE_CONFIG).is_file():
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [folder]


def loaded(folder: Path, field: str) -> list[Path]:
    """Return the weight files that are loaded from `folder`: a single file, or the shards that an index names.

    transformers, diffusers and PEFT each look for their own name, and prefer the single file to an index. If a folder
    has none of these names (for example a LoRA for images), all of its safetensors files are returned. Raises Failure
    if shards or their index are absent.
    """
    there = sorted(folder.glob("*.safetensors"))
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}{WEIGHTS_INDEX}"
        if single.is_file():
            return [single]
        if index.is_file():
            return shards(index, field)
        if parts := [path for path in there if path.name.startswith(f"{stem}-")]:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {folder} has {len(parts)} shards ({parts[0].name}, ...), but no {index.name}. {FETCH_AGAIN}",
            )
    return there


def shards(index: Path, field: str) -> list[Path]:
    """Return the files that an index names. Raises Failure if it cannot be read, or if one of them is absent."""
    check_pointer(index, field)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: {index} is no index of shards ({error}). {FETCH_AGAIN}"
        ) from error
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        listed = ", ".join(absent[:SHOWN]) + ", ..." * (len(absent) > SHOWN)
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {len(absent)} of the {len(names)} files that {index} names are absent: {listed}. Copy or"
            " download them, too",
        )
    return [index.parent / name for name in names]


def check_pointer(path: Path, field: str) -> None:
    """Check that a file is not a pointer that git-lfs should have replaced. Raises Failure if it is."""
    if path.stat().st_size > LFS_POINTER_BYTES:
        return
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {path} is a pointer of git-lfs, not the file that it stands for. Run `git lfs install && git"
                " lfs pull` in its repository",
            )


def check_file(path: Path, field: str) -> None:
    """Check that a safetensors file has a valid header, and all bytes of its tensors. Raises Failure if not."""
    from safetensors import SafetensorError, safe_open

    check_pointer(path, field)
    size = path.stat().st_size
    try:
        header = header_of(path)
        needed = header_bytes(path) + max(
            (tensor["data_offsets"][1] for name, tensor in header.items() if name != METADATA), default=0
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: {path} ({size:,} bytes) is no safetensors file: {error}. {FETCH_AGAIN}"
        ) from error
    if size < needed:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {path} is cut short: it has {size:,} bytes, and its header asks for {needed:,}. {FETCH_AGAIN}",
        )
    try:
        with safe_open(path, "np"):
            pass  # opening it runs the library's checks: overlaps, gaps, sizes that do not fit shapes
    except SafetensorError as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {path} is damaged ({error}). {FETCH_AGAIN}") from error


def header_bytes(path: Path) -> int:
    """Return the offset of the weights in a safetensors file, in bytes: 8 + the length of the header.

    Raises ValueError if the file is shorter than that.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= path.stat().st_size - 8:
        raise ValueError(f"its header would have {length:,} bytes")
    return 8 + length


def header_of(path: Path) -> dict[str, Any]:
    """Return name → {"dtype", "shape", "data_offsets"}. Raises ValueError if there is no header."""
    header_bytes(path)
    return safetensors_header(path)


def shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the weights in `files`, dequantised.

    A weight in 4 bits has its original shape, and tensors that only describe a quantised weight are left out.
    """
    tensors = {
        name: (path, tensor) for path in files for name, tensor in safetensors_header(path).items() if name != METADATA
    }
    found: dict[str, tuple[int, ...]] = {}
    for name, (path, tensor) in tensors.items():
        if packed := QUANT_STATE.fullmatch(name):
            found[packed["of"]] = quantised_shape(path, tensor)
        elif not stands_beside(name, tensors):
            found.setdefault(name, tuple(tensor["shape"]))
    return found


def stands_beside(name: str, tensors: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> bool:
    """Return whether a tensor only describes a quantised weight of `tensors`, and is not a weight itself."""
    beside = BESIDE.fullmatch(name)
    owners = (beside["of"], f"{beside['of']}.weight") if beside else ()
    return any(owner in tensors and tensors[owner][1]["dtype"] in QUANTISED for owner in owners)


def without_scale(files: Iterable[Path]) -> list[str]:
    """Return the weights in FP8 that have no scale in the files.

    transformers 5.23 would use such numbers as the weights themselves, which makes them hundreds of times too large.
    """
    types = {
        name: tensor["dtype"] for path in files for name, tensor in safetensors_header(path).items() if name != METADATA
    }
    return [
        name
        for name, kind in types.items()
        if kind in ("F8_E4M3", "F8_E5M2") and not {f"{name}_scale", f"{name}_scale_inv"} & types.keys()
    ]


def quantised_shape(path: Path, tensor: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the original shape of a weight in 4 bits, from bitsandbytes' description of it.

    `tensor` is the header's entry for the description, which is JSON of a few hundred bytes.
    """
    start, end = tensor["data_offsets"]
    with path.open("rb") as file:
        file.seek(header_bytes(path) + start)
        return tuple(json.loads(file.read(end - start))["shape"])


def count(folder: Path, field: str) -> int:
    """Return the number of elements of the weights that are loaded from `folder`.

    Other files there (`consolidated.safetensors`, an adapter) do not count. Raises Failure if shards are absent.
    """
    return sum(prod(shape) for part in parts(folder) for shape in shapes(loaded(part, field)).values())


def rename(files: Iterable[Path], new_name: Callable[[str], str], into: Path) -> None:
    """Write `files` to the folder `into` with other names of the weights, and an index if there are several files.

    The weights are copied as bytes.
    """
    total, weight_map = 0, dict[str, str]()
    for path in files:
        header = safetensors_header(path)
        renamed = {name if name == METADATA else new_name(name): tensor for name, tensor in header.items()}
        text = json.dumps(renamed, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # safetensors aligns the weights to 8 bytes
        with path.open("rb") as source, (into / path.name).open("wb") as target:
            source.seek(header_bytes(path))
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
        total += sum(
            tensor["data_offsets"][1] - tensor["data_offsets"][0]
            for name, tensor in renamed.items()
            if name != METADATA
        )
        weight_map |= {name: path.name for name in renamed if name != METADATA}
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (into / f"model{WEIGHTS_INDEX}").write_text(json.dumps(index, indent=2))


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return name → {"dtype", "shape", "data_offsets"} of the tensors, and `__metadata__` if there is any.

    The first 8 bytes of the file are the length of the header, little-endian.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))
