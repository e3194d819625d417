"""Sizes of images of about the same number of pixels and several aspect ratios (`image.bucketStep`).

Each image gets the size whose ratio is nearest to its own. It is scaled to cover this size, and what is beyond on two
opposite sides is cut off: little, where a ratio is near. The sizes are those of kohya's sd-scripts for such a step.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.runtime import cores
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from datasets import Dataset

BUCKET = "bucket"  # column of the prepared rows: height and width
AT_ONCE = 100  # image files in memory at a time
TURNED = range(5, 9)  # the values of EXIF's orientation that swap width and height
MUCH = 0.1  # of an image that is cut off, from which on it is counted in the notice


class Size(NamedTuple):
    """Of an image, in pixels."""

    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width


def sizes_of(resolution: int, step: int) -> list[Size]:
    """Return the sizes whose sides are multiples of `step`, from half of `resolution` to twice as much.

    For each height the largest width with at most `resolution`² pixels, and the other way round.
    """
    least, most = -(-resolution // 2 // step) * step, 2 * resolution
    found = set()
    for side in range(least, most + 1, step):
        other = min(resolution**2 // side, most) // step * step
        if other >= least:
            found |= {Size(side, other), Size(other, side)}
    return sorted(found)


def nearest(image: Size, sizes: Sequence[Size]) -> Size:
    """Return the size whose ratio is nearest to that of an image, by the logarithm; of equal ones the largest."""

    def distance(size: Size) -> tuple[float, int]:
        return abs(math.log(image.width * size.height / (image.height * size.width))), -size.pixels

    return min(sizes, key=distance)


def covering(image: Size, size: Size) -> float:
    """Return by how much an image is scaled so that it covers `size`."""
    return max(size.height / image.height, size.width / image.width)


def cut_off(image: Size, size: Size) -> float:
    """Return the share of an image that does not fit into `size`."""
    return 1 - size.pixels / (image.pixels * covering(image, size) ** 2)


def with_buckets(data: Dataset, columns: Sequence[str], spec: FineTuneJobSpec, use: str) -> Dataset:
    """Return the rows with the column `bucket`, and give notice of the sizes and of what is cut off.

    `columns`: of image files; the size of a row follows from that of the first one, and the others get the same.
    `use`: of the rows, for the notice.
    """
    assert spec.image.bucket_step is not None, "the caller has asked for sizes"
    sizes = sizes_of(spec.image.resolution, spec.image.bucket_step)
    seen = {name: seen_sizes(data, name) for name in columns}
    chosen = [nearest(image, sizes) for image in seen[columns[0]]]
    pairs = [pair for of_column in seen.values() for pair in zip(of_column, chosen, strict=True)]
    notice(described(chosen, pairs, use))
    if use == "training" and (text := short_batches(chosen, spec.training.micro_batch_size or 1)):
        notice(text)
    return data.add_column(BUCKET, [list(size) for size in chosen])


def seen_sizes(data: Dataset, column: str) -> list[Size]:
    """Return the sizes of the images as they are seen, turned as their EXIF data say."""
    found: list[Size] = []
    with ThreadPoolExecutor(cores.available()) as threads:
        for batch in data.select_columns([column]).iter(AT_ONCE):
            found += threads.map(seen_size, batch[column])
    return found


def seen_size(image: dict[str, Any]) -> Size:
    """Return the size of an image file, which `datasets` stores with "bytes" and "path"."""
    import PIL.Image
    from PIL.ExifTags import Base

    with PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
        width, height = opened.size
        turned = opened.getexif().get(Base.Orientation) in TURNED
    return Size(width, height) if turned else Size(height, width)


def described(chosen: Sequence[Size], pairs: Sequence[tuple[Size, Size]], use: str) -> str:
    """Return the notice about the rows of a split.

    `chosen`: the size of each row. `pairs`: size of each image, and the one in which it is learnt.
    """
    counts = Counter(chosen)
    shares = [cut_off(image, size) for image, size in pairs]
    text = (
        f"spec.image.bucketStep: {len(chosen)} {use} rows have images of {len(counts)} sizes. At most"
        f" {max(shares):.0%} of an image is cut off"
    )
    if much := sum(share > MUCH for share in shares):
        text += f", of {much} of {len(shares)} images more than {MUCH:.0%}"
    if enlarged := sum(covering(image, size) > 1 for image, size in pairs):
        text += f"; {enlarged} of {len(shares)} images are smaller, and enlarged"
    shown = [f"{size.height} × {size.width}: {count}" for size, count in counts.most_common()]
    return f"{text}. Rows by height × width: {', '.join(shown)}"


def short_batches(chosen: Sequence[Size], micro_batch: int) -> str | None:
    """Return a notice if an epoch has micro-batches with fewer than `micro_batch` rows; None if it has none."""
    counts = Counter(chosen).values()
    short = sum(count % micro_batch > 0 for count in counts)
    if not short:
        return None
    batches = sum(-(-count // micro_batch) for count in counts)
    return (
        f"spec.training.microBatchSize: {short} of the {batches} micro-batches of an epoch have fewer than"
        f" {micro_batch} rows, because all of one have images of one size, and so some steps have fewer rows than"
        " batchSize. With 1 all have as many"
    )


def numbered(sizes: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of each size among all that there are, in their order."""
    numbers = {size: number for number, size in enumerate(sorted({(height, width) for height, width in sizes}))}
    return [numbers[height, width] for height, width in sizes]


def of_rows(rows: Dataset, spec: FineTuneJobSpec) -> list[Size]:
    """Return the size of the images of each encoded row."""
    if BUCKET not in rows.column_names:
        return [Size(spec.image.resolution, spec.image.resolution)] * len(rows)
    return [Size(*size) for size in rows[BUCKET][:]]


def largest(rows: Dataset | None, spec: FineTuneJobSpec) -> Size:
    """Return the size with the most pixels of encoded rows; a square where they are not known."""
    return max(_found(rows, spec), key=lambda size: size.pixels)


def average(rows: Dataset | None, spec: FineTuneJobSpec) -> Size:
    """Return the size of encoded rows that has about as many pixels as all have on average."""
    found = _found(rows, spec)
    mean = sum(size.pixels * count for size, count in found.items()) / found.total()
    return min(found, key=lambda size: abs(size.pixels - mean))


def _found(rows: Dataset | None, spec: FineTuneJobSpec) -> Counter[Size]:
    """Return the sizes of encoded rows, and how many rows have each."""
    return Counter([Size(spec.image.resolution, spec.image.resolution)] if rows is None else of_rows(rows, spec))
