"""Sizes of images for `image.bucketStep`: which there are, which an image gets, and what is said of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import datasets
import pytest
from datasets import Dataset
from PIL import Image
from PIL.ExifTags import Base

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.runtime import notices
from luthier_trainer.tasks.buckets import BUCKET, Size, average, largest, nearest, seen_size, sizes_of, with_buckets

# Of the report on SDXL (arXiv:2307.01952, table 2): the heights and widths up to the square.
OF_SDXL = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024),
)  # fmt: skip


def spec_of(resolution: int = 32, step: int = 8, micro_batch: int | None = None) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "task": "text-to-image",
            "model": {"id": "a/b"},
            "dataset": {"id": "a/c"},
            "image": {"resolution": resolution, "bucketStep": step},
            "training": {"microBatchSize": micro_batch},
        }
    )


def test_the_sizes_are_among_those_of_sdxl() -> None:
    found = sizes_of(1024, 64)
    assert {*found} <= {*OF_SDXL, *((width, height) for height, width in OF_SDXL)}
    assert {(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (768, 1344), (640, 1536), (512, 2048)} <= {*found}
    assert max(size.pixels for size in found) == 1024**2


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 32), (1024, 8), (32, 32), (1000, 40)])
def test_no_size_has_more_pixels_than_the_square(resolution: int, step: int) -> None:
    found = sizes_of(resolution, step)
    assert Size(resolution, resolution) in found
    for size in found:
        assert size.pixels <= resolution**2
        assert all(side % step == 0 and resolution / 2 <= side <= 2 * resolution for side in size)
    assert {Size(size.width, size.height) for size in found} == {*found}


@dataclass(frozen=True)
class Nearest:
    image: tuple[int, int]
    """Height and width."""
    size: tuple[int, int]


NEAREST = [
    Nearest(image=(500, 500), size=(1024, 1024)),
    Nearest(image=(3000, 2000), size=(1216, 832)),
    Nearest(image=(2000, 3000), size=(832, 1216)),
    Nearest(image=(1080, 1920), size=(768, 1344)),
    Nearest(image=(900, 1200), size=(896, 1152)),
    Nearest(image=(100, 5000), size=(512, 2048)),
]


@pytest.mark.parametrize("case", NEAREST, ids=lambda case: str(case.image))
def test_an_image_gets_the_nearest_ratio(case: Nearest) -> None:
    assert nearest(Size(*case.image), sizes_of(1024, 64)) == case.size


def stored(height: int, width: int, orientation: int | None = None) -> dict[str, Any]:
    """An image file as `datasets` stores it."""
    exif, file = Image.Exif(), io.BytesIO()
    if orientation:
        exif[Base.Orientation] = orientation
    Image.new("RGB", (width, height)).save(file, "JPEG", exif=exif)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_an_image_is_measured_as_it_is_decoded(orientation: int | None) -> None:
    file = stored(40, 30, orientation)
    decoded = Dataset.from_dict({"image": [file]}).cast_column("image", datasets.Image())[0]["image"]
    assert seen_size(file) == (decoded.height, decoded.width)


SIZES = [(64, 64), (64, 64), (64, 256), (256, 64), (20, 20), (90, 58), (64, 128)]


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_what_is_said(micro_batch: int | None) -> None:
    rows = Dataset.from_dict({"pixel_values": [stored(*size) for size in SIZES]})
    with notices.collecting() as said:
        found = with_buckets(rows, ["pixel_values"], spec_of(micro_batch=micro_batch), "training")
    assert found[BUCKET][:] == [[32, 32], [32, 32], [16, 64], [64, 16], [32, 32], [40, 24], [24, 40]]
    expect = [
        "spec.image.bucketStep: 7 training rows have images of 5 sizes. At most 17% of an image is cut off, of 1 of 7"
        " images more than 10%; 1 of 7 images are smaller, and enlarged. Rows by height × width: 32 × 32: 3, 16 × 64:"
        " 1, 64 × 16: 1, 40 × 24: 1, 24 × 40: 1"
    ]
    if micro_batch:
        expect.append(
            "spec.training.microBatchSize: 5 of the 6 micro-batches of an epoch have fewer than 2 rows, because all of"
            " one have images of one size, and so some steps have fewer rows than batchSize. With 1 all have as many"
        )
    assert said == expect


def test_what_is_planned_for() -> None:
    rows = Dataset.from_dict({BUCKET: [[16, 64], [24, 40], [24, 40], [24, 40]]})
    assert largest(rows, spec_of()) == (16, 64)
    assert average(rows, spec_of()) == (24, 40)
    assert largest(None, spec_of()) == average(None, spec_of()) == (32, 32)
