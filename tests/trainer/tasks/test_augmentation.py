"""`training.augmentation`: what happens to an image, when the same happens again, and to which images nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from prepared_workspace import without_the_machine
from torch.utils.data import DataLoader
from trainer.digits import SIDE, write_digits
from trainer.preparing import prepared
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, ViTImageProcessor

from luthier_api.augmentation import Augmentation, RandomCrop
from luthier_api.run import FineTuneRun
from luthier_trainer.publish import model_card
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.augmentation import OPERATIONS, Augmenter, part_of
from luthier_trainer.tasks.image_classification import ImageCollator, check_crops
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

MakeRun = Callable[..., FineTuneRun]
Pixels = numpy.ndarray
ALL = {
    "crop": {"scale": [0.3, 1.0]},
    "horizontalFlip": 0.5,
    "verticalFlip": 0.5,
    "randAugment": {"magnitude": 20},
    "colorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
}


def photograph(seed: int = 0, size: tuple[int, int] = (30, 20)) -> Image.Image:
    """Pixels at random, 10 to 240."""
    return Image.fromarray(numpy.random.default_rng(seed).integers(10, 240, (*size[::-1], 3), dtype="uint8"))


def augmenter(seed: int = 1, **settings: Any) -> Augmenter:
    return Augmenter(Augmentation.model_validate(settings), seed, (SIDE, SIDE), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class ChangeCase:
    name: str
    settings: dict[str, Any]
    expected: Callable[[Image.Image], Pixels]


CHANGES = [
    ChangeCase(
        name="mirrored",
        settings={"horizontalFlip": 1},
        expected=lambda image: numpy.asarray(image)[:, ::-1],
    ),
    ChangeCase(
        name="upside down",
        settings={"verticalFlip": 1},
        expected=lambda image: numpy.asarray(image)[::-1],
    ),
    ChangeCase(
        name="the whole of it, scaled",
        settings={"crop": {"scale": [1, 1], "ratio": [1.5, 1.5]}},
        expected=lambda image: numpy.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)),
    ),
    ChangeCase(
        name="no such part fits",
        settings={"crop": {"scale": [1, 1], "ratio": [1, 1]}},
        expected=lambda image: numpy.asarray(
            image.crop((5, 0, 25, 20)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        ),
    ),
]


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.name)
def test_what_happens_to_an_image(case: ChangeCase) -> None:
    image = photograph()
    assert (numpy.asarray(augmenter(**case.settings)(image, 0, 0)) == case.expected(image)).all()


@dataclass(frozen=True)
class OperationCase:
    name: str
    strength: float
    expected: Callable[[Pixels], Pixels]


def moved(pixels: Pixels, across: int, down: int) -> Pixels:
    """Pixels that come from so far to the right and below."""
    found = numpy.zeros_like(pixels)
    height, width = pixels.shape[:2]
    found[: height - down, : width - across] = pixels[down:, across:]
    return found


def brighter(pixels: Pixels, factor: float) -> Pixels:
    found: Pixels = (pixels * numpy.float32(factor)).clip(0, 255).astype("uint8")
    return found


OPERATION_CASES = [
    OperationCase(name="identity", strength=0.3, expected=lambda pixels: pixels),
    OperationCase(name="translate-x", strength=0.3, expected=lambda pixels: moved(pixels, 4, 0)),
    OperationCase(name="translate-y", strength=0.3, expected=lambda pixels: moved(pixels, 0, 2)),
    OperationCase(name="posterize", strength=-0.3, expected=lambda pixels: pixels & 0b11111110),
    OperationCase(name="posterize", strength=1.0, expected=lambda pixels: pixels & 0b11110000),
    OperationCase(
        name="solarize",
        strength=0.3,
        expected=lambda pixels: numpy.where(pixels < 178.5, pixels, 255 - pixels),
    ),
    OperationCase(name="brightness", strength=-0.5, expected=lambda pixels: brighter(pixels, 0.55)),
    OperationCase(name="shear-x", strength=0.0, expected=lambda pixels: pixels),
    OperationCase(name="rotate", strength=0.0, expected=lambda pixels: pixels),
    OperationCase(name="color", strength=0.0, expected=lambda pixels: pixels),
    OperationCase(name="contrast", strength=0.0, expected=lambda pixels: pixels),
    OperationCase(name="sharpness", strength=0.0, expected=lambda pixels: pixels),
]


@pytest.mark.parametrize("case", OPERATION_CASES, ids=lambda case: f"{case.name} {case.strength}")
def test_an_operation_against_numpy(case: OperationCase) -> None:
    image = photograph()
    found = numpy.asarray(OPERATIONS[case.name](image, case.strength)).astype(int)
    assert abs(found - case.expected(numpy.asarray(image)).astype(int)).max() <= 1


def test_colours_are_turned_and_brightened_within_their_bounds() -> None:
    """Of 200 draws: the mean brightness spreads over what is asked for, and a turned hue keeps brightness."""
    image = Image.new("RGB", (4, 4), (100, 50, 20))
    bright = [
        numpy.asarray(augmenter(colorJitter={"brightness": 0.4})(image, 0, row))[0, 0, 0] / 100 for row in range(200)
    ]
    assert 0.59 < min(bright) < 0.65 < 1.35 < max(bright) < 1.41
    turned = numpy.array(
        [numpy.asarray(augmenter(colorJitter={"hue": 0.5})(image, 0, row))[0, 0] for row in range(200)]
    )
    assert (abs(turned.max(axis=1).astype(int) - 100) <= 1).all()
    assert len({tuple(pixel) for pixel in turned.tolist()}) > 100


def test_parts_have_the_areas_and_ratios_that_are_asked_for() -> None:
    random = numpy.random.default_rng(0)
    wanted = RandomCrop(scale=[0.1, 0.5], ratio=[0.5, 2.0])
    parts = numpy.array([part_of(300, 200, wanted, random) for _ in range(2000)])
    left, top, width, height = parts.T
    area, ratio = width * height / 60_000, numpy.log(width / height)
    assert min(left.min(), top.min()) >= 0
    assert (left + width).max() <= 300
    assert (top + height).max() <= 200
    assert 0.09 < area.min() < 0.12 < 0.48 < area.max() < 0.51
    assert abs(ratio).max() < numpy.log(2) + 0.02
    # Uniform: the mean is in the middle, within four standard errors.
    assert abs(area.mean() - 0.3) < 0.02
    assert abs(ratio.mean()) < 0.05


def test_images_are_flipped_as_often_as_asked_for() -> None:
    image = photograph()
    flipped = sum(augmenter(horizontalFlip=0.3)(image, 0, row) != image for row in range(1000))
    assert abs(flipped - 300) < 60


def rows(count: int) -> list[dict[str, Any]]:
    return [{"pixel_values": photograph(row), "labels": row % 2, "row": row} for row in range(count)]


def seen(workers: int, batch: int, epochs: int) -> list[torch.Tensor]:
    """The images of each epoch, [rows, ...], as a data loader with so many workers makes them."""
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    collator = ImageCollator(processor, augmenter(**ALL))
    loader: Any = DataLoader(rows(6), batch, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0)
    found = []
    for epoch in range(epochs):
        collator.begin_epoch(epoch)
        found.append(torch.cat([made["pixel_values"] for made in loader]))
    return found


def test_what_is_drawn_follows_from_epoch_and_row_alone() -> None:
    """Not from the workers, which live for all epochs, nor from the rows of the same batch."""
    alone, divided = seen(workers=0, batch=2, epochs=2), seen(workers=2, batch=3, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(alone, divided, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_held_out_rows_are_as_the_processor_makes_them() -> None:
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    held_out = [{name: value for name, value in row.items() if name != "row"} for row in rows(3)]
    made = ImageCollator(processor, augmenter(**ALL))(held_out)["pixel_values"]
    expected = processor(images=[row["pixel_values"] for row in held_out], return_tensors="pt")["pixel_values"]
    assert torch.equal(made, expected)


def test_a_crop_of_the_whole_image_changes_nothing() -> None:
    """It goes another way through the processor, and comes out the same."""
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    given = [row | {"pixel_values": photograph(i, (20, 20))} for i, row in enumerate(rows(3))]
    made = ImageCollator(processor, augmenter(crop={"scale": [1, 1], "ratio": [1, 1]}))(given)["pixel_values"]
    expected = processor(images=[row["pixel_values"] for row in given], return_tensors="pt")["pixel_values"]
    assert torch.equal(made, expected)


def test_a_processor_that_scales_in_any_case_is_refused() -> None:
    class Stubborn(ViTImageProcessor):
        def __call__(self, images: Any, **options: Any) -> Any:
            parts = [image.crop((0, 0, 9, 9)) for image in images]
            return super().__call__(parts, return_tensors="pt", do_resize=False)

    with pytest.raises(Failure, match=r"augmentation\.crop: .* \(Stubborn\) cannot be told"):
        check_crops(Stubborn(size={"height": 9, "width": 9}, resample=None))


class Epochs(TrainerCallback):
    """Notes at the end of each epoch by which number images were drawn."""

    loop: Any

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.drawn.append(int(self.loop.data_collator.epoch))


def test_a_training_with_changed_images(classify: MakeRun, tmp_path: Path) -> None:
    """It resumes to the last bit within the second epoch, is measured on images as they are, and the card tells it."""
    run = classify(
        dataset={"files": [str(write_digits(tmp_path / "few", each=10))]},  # three steps an epoch
        training={"maxSteps": 6, "saveSteps": 4, "logSteps": 1, "augmentation": ALL},
    )
    _, data = prepared(run)
    assert set(data["train"].column_names) == {"pixel_values", "labels", "row"}
    assert set(data["eval"].column_names) == {"pixel_values", "labels"}
    epochs = Epochs()
    first, workspace = train.main(run, [epochs]).metrics or {}, Path(run.workspace)
    assert epochs.drawn == [0, 1]
    result = workspace / "result"
    processor = AutoImageProcessor.from_pretrained(result)
    model = AutoModelForImageClassification.from_pretrained(result)
    with torch.no_grad():
        pixels = processor(images=[row["pixel_values"].convert("RGB") for row in data["eval"]], return_tensors="pt")
        logits = model.eval()(**pixels).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(data["eval"]["labels"])).item()
    assert first["evalLoss"] == pytest.approx(expected, abs=1e-5)
    assert "| Augmentation | crop scale=[0.3, 1.0] ratio=" in model_card.card(run, read_prepared(run), result)

    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for folder in (result, workspace / "checkpoints" / "checkpoint-6"):
        folder.rename(folder.with_name(f".{folder.name}"))
    again = train.main(run).metrics or {}
    assert without_the_machine(again) == without_the_machine(first)
    resumed = AutoModelForImageClassification.from_pretrained(result).state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in resumed.items())
