"""Sizes of images by aspect ratio (`image.aspectRatio`): those of diffusers' tables, by the size of the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_trainer.generation.families import FAMILIES
from luthier_trainer.models import pipelines
from luthier_trainer.runtime.failure import Failure

FLUX_SIDE = 128  # of a latent: FLUX's configuration has none, and diffusers' pipeline this one


def trained_side(path: Path, field: str) -> int:
    """Return the pixels of a side of the images that the pipeline in `path` was trained with."""
    index = pipelines.index_of(path, field)
    kinds, denoiser = pipelines.classes(index, field), FAMILIES[index["_class_name"]].denoiser
    configs = {name: kinds[name].load_config(path / name, local_files_only=True) for name in (denoiser, "vae")}
    latent = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    return int(configs[denoiser].get("sample_size") or FLUX_SIDE) * int(latent)


def sizes_of(side: int) -> Mapping[str, list[float]]:
    """Return diffusers' table for models of `side` pixels: height through width, as text → height and width.

    Raises Failure if there is none.
    """
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as tables

    known = {512: tables.ASPECT_RATIO_512_BIN, 1024: tables.ASPECT_RATIO_1024_BIN}
    if side not in known:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.image.aspectRatio: the model was trained with images of {side} pixels, and sizes are known for 512"
            " and 1024; set width and height",
        )
    return known[side]


def size_of(ratio: str, side: int) -> tuple[int, int]:
    """Return width and height of the images of an aspect ratio, such as 16:9, for a model of `side` pixels.

    Raises Failure if no sizes are known for such models.
    """
    width, height = map(int, ratio.split(":"))
    table = sizes_of(side)
    nearest = min(table, key=lambda key: abs(float(key) - height / width))
    return int(table[nearest][1]), int(table[nearest][0])
