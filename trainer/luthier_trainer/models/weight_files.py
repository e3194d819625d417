"""The weights in a folder: which files are loaded, what their headers promise, and whether they are whole.

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

# What transformers, diffusers and PEFT call the weights that they load
STEMS = (
    "model",
    "diffusion_pytorch_model",
    "adapter_model",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_BYTES = 1024  # git-lfs: a pointer file is smaller
METADATA = "__metadata__"
FETCH_AGAIN = "Copy or download it again"
SHOWN = 3

# What stands beside a quantised weight: bitsandbytes' statistics, and the scales of FP8.
QUANT_STATE = re.compile(r"(?P<of>.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
BESIDE = re.compile(
    r"(?P<of>.+?)(\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|activation_scale|input_scale)|_scale|_scale_inv)"
)
QUANTISED = {"U8", "I8", "F8_E4M3", "F8_E5M2"}  # safetensors' names of the types that such weights have


def check(folder: Path, field: str) -> None:
    """Whether the files that are loaded from `folder`, a model, an adapter or a pipeline, are there and whole. Raises
    Failure.
    """
    for part in {folder, *parts(folder)}:
        for path in sorted(p for p in part.iterdir() if p.is_file() and p.suffix != ".safetensors"):
            check_pointer(path, field)
    for part in parts(folder):
        for path in loaded(part, field):
            check_file(path, field)


def parts(folder: Path) -> list[Path]:
    """The folders that weights are loaded from: those of a pipeline's components, or `folder` itself."""
    if (folder / PIPELINE_CONFIG).is_file():
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [folder]


def loaded(folder: Path, field: str) -> list[Path]:
    """The weight files that are loaded from `folder`: one file, or the shards that an index names. Raises Failure where
    shards are absent.

    transformers, diffusers and PEFT look for their own name, and take the single file before an index. A folder that
    has none of these names (a LoRA for images, say) holds what it holds.
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
    """The files that an index names. Raises Failure where it cannot be read, or one of them is absent."""
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
    """Raises Failure for a file that git-lfs was to replace with the real one."""
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
    """Whether a safetensors file has a header and as many bytes as that asks for. Raises Failure."""
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
            pass  # the library's own checks: overlaps, gaps, sizes that do not fit shapes
    except SafetensorError as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {path} is damaged ({error}). {FETCH_AGAIN}") from error


def header_bytes(path: Path) -> int:
    """Where the weights begin in a safetensors file, in bytes. Raises ValueError where the file is shorter than
    that.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= path.stat().st_size - 8:
        raise ValueError(f"its header would have {length:,} bytes")
    return 8 + length


def header_of(path: Path) -> dict[str, Any]:
    """Name → {"dtype", "shape", "data_offsets"}. Raises ValueError where there is no header."""
    header_bytes(path)
    return safetensors_header(path)


def shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name → shape of the weights in `files`, as they are meant: a weight in 4 bits with its real shape, and nothing
    that stands beside it.
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
    """Whether a tensor belongs to a quantised weight among `tensors`, and is none itself."""
    beside = BESIDE.fullmatch(name)
    owners = (beside["of"], f"{beside['of']}.weight") if beside else ()
    return any(owner in tensors and tensors[owner][1]["dtype"] in QUANTISED for owner in owners)


def without_scale(files: Iterable[Path]) -> list[str]:
    """The weights in FP8 that no scale stands beside: transformers 5.23 takes such numbers for the weights themselves,
    hundreds of times too large.
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
    """The shape in bitsandbytes' description of a weight in 4 bits: JSON, a few hundred bytes."""
    start, end = tensor["data_offsets"]
    with path.open("rb") as file:
        file.seek(header_bytes(path) + start)
        return tuple(json.loads(file.read(end - start))["shape"])


def count(folder: Path, field: str) -> int:
    """Elements of the weights that are loaded from `folder`. What else lies there (`consolidated.safetensors`, an
    adapter) does not count.
    """
    return sum(prod(shape) for part in parts(folder) for shape in shapes(loaded(part, field)).values())


def rename(files: Iterable[Path], new_name: Callable[[str], str], into: Path) -> None:
    """Write `files` to folder `into` with other names of weights, and an index where there are several. The weights are
    copied as bytes.
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
    """Name → {"dtype", "shape", "data_offsets"}; the first 8 bytes of the file say how long it is."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))
