"""Checks of images in `prepare`: which can be used, and whether the model accepts the tensors of its processor.

Images are saved in the workspace as encoded files and are decoded when the training reads them. As pixels they would
take ten times the space.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute
from luthier_trainer.data import columns
from luthier_trainer.data.load import Rows
from luthier_trainer.methods.trainable import with_adapters
from luthier_trainer.models import inspect, processors
from luthier_trainer.runtime import cores
from luthier_trainer.runtime.classify import FORBIDDEN_ERRNOS, STORAGE_ERRNOS, os_error
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.base import Model
from luthier_trainer.tasks.pretrained import PretrainedTask, with_labels
from luthier_trainer.workspace.plan import smallest_batch

if TYPE_CHECKING:
    import PIL.Image
    from datasets import Dataset
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

FIELD = "spec.dataset.columns.image"
# The number of a captioned row in its split, on which its random numbers depend. transformers counts the rows of a step
# by a column of this name.
ROW = "labels"
PIXELS = "pixel_values"  # the name in transformers, whose Trainer drops columns with other names
# One core decodes and scales 350 photographs of 512 × 384 pixels per second; a GPU trains on more than that.
MIN_WORKERS, MAX_WORKERS = 2, 8
AT_ONCE = 100  # image files in memory at a time; half a gigabyte for files of a camera
# Pillow's modes with more than 8 bits per channel, and the value at which it clips them instead of scaling them.
DEEP, WHITE = (
    ("I", "F"),
    255,
)
WIDE, TALL = (96, 48), (64, 80)  # sizes in pixels of two images with different aspect ratios


class ImageTask(PretrainedTask):
    """A base class of tasks whose model reads images."""

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (spec.dataset.columns.image,)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return fitting(rows, spec)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        return contents(rows, spec)

    def read_processor(self, folder: Path, field: str) -> BaseImageProcessor:
        return processors.read_image_processor(folder, field)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        check(model.config, model.processor, spec, rows)
        super().check_model(model, spec, rows, labels)

    def compute(
        self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None
    ) -> Compute | None:
        """Return the multiply-adds of one image of the size that the processor makes."""
        import PIL.Image

        from luthier_trainer.models.compute import of_images
        from luthier_trainer.models.heads import heads_of

        bare = inspect.skeleton(with_labels(model.config, labels), self.task, inspect.MODEL).eval()
        made = model.processor(images=[PIL.Image.new("RGB", WIDE)], return_tensors="pt")[PIXELS]
        with contextlib.suppress(NotImplementedError, RuntimeError):  # the model reads values, which meta tensors lack
            whole = of_images(bare, {PIXELS: made.to("meta")})
            return with_adapters(whole, bare, heads_of(bare, self.task), spec)
        return None

    def loader_workers(self, cores: int) -> int:
        return loader_workers(cores)


def loader_workers(cores: int) -> int:
    """Return the number of data loader processes, which decode and scale images, per GPU with `cores` CPU cores."""
    return min(max(cores - 1, MIN_WORKERS), MAX_WORKERS)


def fitting(rows: Rows, spec: FineTuneJobSpec) -> Rows:
    """Return the rows with their images as encoded files. Raises Failure if an image is missing or cannot be read."""
    from datasets import Image

    name = spec.dataset.columns.image
    others = [other for other in (spec.dataset.columns.label, spec.dataset.columns.text) if other is not None]
    columns.require(rows, name, FIELD, taken=others)
    if not isinstance(feature := rows.data.features[name], Image):
        hint = (
            f"columns of images: {', '.join(rows.images)}"
            if rows.images
            else "no column holds images; folders of them do, with dataset.format: imagefolder"
        )
        raise columns.invalid(
            f'{FIELD}: column "{name}" of {rows.origin} holds {getattr(feature, "dtype", feature)}, not images ({hint})'
        )
    stored = rows.data.cast_column(name, Image(decode=False))
    if found := unusable(stored.select_columns([name]), name):
        row, first = found[0]
        raise columns.invalid(
            f"{FIELD}: {len(found)} images of {rows.origin} cannot be used. The first is {rows.place(row)}: {first}."
            " Replace or remove them"
        )
    return replace(rows, data=stored)


def contents(rows: Rows, spec: FineTuneJobSpec) -> Iterator[list[bytes]]:
    """Yield the image files of the rows, in batches."""
    name = spec.dataset.columns.image
    for batch in rows.data.select_columns([name]).iter(AT_ONCE):
        yield [Path(i["path"]).read_bytes() if i["bytes"] is None else i["bytes"] for i in batch[name]]


def unusable(stored: Dataset, name: str) -> list[tuple[int, str]]:
    """Return row number and reason of each image in column `name` that the training could not use."""
    found = []
    with ThreadPoolExecutor(cores.available()) as threads:
        for start in range(0, len(stored), AT_ONCE):
            problems = threads.map(problem, stored[start : start + AT_ONCE][name])
            found += [(start + i, text) for i, text in enumerate(problems) if text]
    return found


def problem(image: dict[str, Any] | None) -> str | None:
    """Return why the training could not use an image; None if it can.

    `image`: as `datasets` stores it, with "bytes" and "path". An error that the volume or its permissions caused is
    passed on.
    """
    import PIL.Image
    import PIL.ImageOps

    if image is None:
        return "there is none"
    name = f"{image['path']}: " if image["path"] else ""
    try:
        with PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
            opened.load()
            seen = PIL.ImageOps.exif_transpose(opened).convert("RGB")
            lost = loss(opened, seen)
    except Exception as error:  # the decoders of Pillow's formats raise many types of exceptions
        if os_error(error, STORAGE_ERRNOS | FORBIDDEN_ERRNOS):
            raise  # an error of the volume or its permissions, not of the data
        return f"{name}{' '.join(str(error).split())[:200]}"
    return f"{name}{lost}" if lost else None


def loss(image: PIL.Image.Image, seen: PIL.Image.Image) -> str | None:
    """Return what an image loses in the conversion to RGB that all models need; None if it can be used.

    `seen`: the converted image.
    """
    extremes: Any = image.getextrema()
    if image.mode.startswith(DEEP):
        low, high = extremes
        if low < 0 or high > WHITE or (image.mode == "F" and high <= 1):
            return (
                f"its values are from {low:g} to {high:g}, and would be cut off at 0 and {WHITE}; save it with 8 bits a"
                " channel"
            )
    extremes = seen.getextrema()
    if image.has_transparency_data and all(low == high for low, high in extremes):
        clearest, densest = image.convert("RGBA").getchannel("A").getextrema()
        if clearest != densest:
            return "only its transparency varies, which a model does not see; put it on a background"
    return None


def check(config: PreTrainedConfig, processor: BaseImageProcessor, spec: FineTuneJobSpec, rows: int) -> None:
    """Check that the model accepts what the processor makes of images, also in the smallest batch of the training.

    `rows`: the number of training rows. Raises Failure if not.
    """
    shape = shape_of(processor)
    check_pixels(config, shape, spec.task)
    if smallest_batch(spec, rows) == 1:
        check_alone(inspect.skeleton(config, spec.task, inspect.MODEL), shape, rows)


def shape_of(processor: BaseImageProcessor) -> tuple[int, ...]:
    """Return the shape of the tensor that the processor makes of any image, [channels, height, width].

    Raises Failure if it depends on the image.
    """
    import PIL.Image

    shapes = []
    for size in (WIDE, TALL):
        try:
            made = processor(images=[PIL.Image.new("RGB", size)], return_tensors="pt")
        except Exception as error:  # processors check their settings in use, with many exceptions
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: its image processor ({type(processor).__name__}) fails: {type(error).__name__}:"
                f" {' '.join(str(error).split())[:300]}. See its preprocessor_config.json",
            ) from error
        if PIXELS not in made:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: its image processor makes no {PIXELS} (it makes {', '.join(made)})",
            )
        shapes.append(tuple(made[PIXELS].shape))
    if shapes[0] != shapes[1]:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{inspect.MODEL}: its image processor makes tensors of {by(shapes[0][1:])} and of {by(shapes[1][1:])} from"
            " images of other shapes, which form no batch; set do_resize and a size of height and width in its"
            " preprocessor_config.json",
        )
    return shapes[0][1:]


def check_pixels(config: PreTrainedConfig, shape: tuple[int, ...], task: str) -> None:
    """Check that the model accepts tensors of a shape, [channels, height, width]. Raises Failure if not."""
    model = inspect.skeleton(config, task, inspect.MODEL)
    try:
        unused_parameters(model, shape)
    except Exception as error:  # architectures check their inputs with many types of exceptions
        text = " ".join(str(error).split())[:300]
        if "meta tensor" not in text.lower():  # a model that reads values, which meta tensors lack, is not checked
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{inspect.MODEL}: its image processor makes tensors of {by(shape)}, which the model does not"
                f" take: {text}",
            ) from error


def unused_parameters(model: PreTrainedModel, shape: tuple[int, ...]) -> set[str]:
    """Return the names of the parameters that do not affect the logits (`heads.unused_parameters`).

    `shape`: of an image, [channels, height, width].
    """
    import torch

    from luthier_trainer.models import heads

    return heads.unused_parameters(model, {PIXELS: torch.empty(2, *shape, device="meta")})


def check_alone(model: PreTrainedModel, shape: tuple[int, ...], rows: int) -> None:
    """Check that the model can train on a batch of one image, [channels, height, width]. Raises Failure if not.

    BatchNorm, for example, needs more than one value per channel.
    """
    import torch

    with contextlib.suppress(NotImplementedError, RuntimeError):  # the model reads values, which meta tensors lack
        try:
            model.train()(pixel_values=torch.empty(1, *shape, device="meta"))
        except ValueError as error:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.training.microBatchSize: {model.config.model_type} cannot learn from a batch of one image, and"
                f" with {rows} rows there is one in each epoch; choose a size of 2 or more that leaves another rest"
                f" ({error})",
            ) from error


def by(shape: tuple[int, ...]) -> str:
    """Return a shape as text for a message."""
    return " × ".join(map(str, shape))
