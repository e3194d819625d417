"""Random changes of training images (`training.augmentation`), with Pillow alone.

What is drawn for an image follows from the seed, the epoch and the number of its row. So a resumed run, other numbers
of processes or of data loader workers, and other micro-batches see the same images.

torchvision has these operations, too. It is not used, because it draws from one global generator, and because
transformers would read images with other processors if it were installed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier_api.augmentation import Augmentation, ColorJitter, RandAugment, RandomCrop

if TYPE_CHECKING:
    import numpy
    import PIL.Image

    Image = PIL.Image.Image
    Random = numpy.random.Generator

TRIES = 10  # of a crop whose sides are within the image, as in torchvision
MAGNITUDES = 30  # the largest magnitude
HUES = 256  # values of a channel of Pillow
WIDTH = 331.0  # pixels of the images for which the paper of RandAugment says how far they are moved
FAR = 150.0  # pixels, of these


@dataclass(frozen=True)
class Augmenter:
    """Changes training images."""

    settings: Augmentation
    seed: int
    size: tuple[int, int]
    """Height and width in pixels that the model reads."""
    resample: int
    """Pillow's number of the filter with which the processor scales images."""

    def __call__(self, image: Image, epoch: int, row: int) -> Image:
        """Return an RGB image, changed. `row`: its number in the training split."""
        import numpy

        digest = hashlib.blake2b(f"{self.seed}:{epoch}:{row}".encode(), digest_size=8).digest()
        random = numpy.random.default_rng(int.from_bytes(digest, "big"))
        wanted = self.settings
        if wanted.crop:
            image = cropped(image, wanted.crop, random, self.size, self.resample)
        image = flipped(image, wanted, random)
        if wanted.rand_augment:
            image = rand_augmented(image, wanted.rand_augment, random)
        if wanted.color_jitter:
            image = jittered(image, wanted.color_jitter, random)
        return image

    @property
    def options(self) -> Mapping[str, Any]:
        """The arguments of the processor for such images: a crop has the size of the model already."""
        return CROPPED if self.settings.crop else {}


CROPPED: Mapping[str, Any] = {"do_resize": False, "do_center_crop": False}
"""Arguments of a processor for images that have the size of the model."""


def cropped(image: Image, wanted: RandomCrop, random: Random, size: tuple[int, int], resample: int) -> Image:
    """Return a part of the image at random, scaled to `size`, height and width.

    If no part with the drawn area and ratio is within the image, it is the largest one in the middle with a fitting
    ratio.
    """
    left, top, width, height = part_of(image.width, image.height, wanted, random)
    part = image.crop((left, top, left + width, top + height))
    return part.resize((size[1], size[0]), resample)


def part_of(width: int, height: int, wanted: RandomCrop, random: Random) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a part at random of an image of `width` × `height` pixels."""
    least, most = wanted.ratio
    for _ in range(TRIES):
        area = width * height * random.uniform(wanted.scale[0], wanted.scale[1])
        ratio = math.exp(random.uniform(math.log(least), math.log(most)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = random.integers(width - across + 1), random.integers(height - down + 1)
            return int(left), int(top), across, down
    across, down = width, height
    if width / height < least:
        down = max(round(width / least), 1)
    elif width / height > most:
        across = max(round(height * most), 1)
    return (width - across) // 2, (height - down) // 2, across, down


def flipped(image: Image, wanted: Augmentation, random: Random) -> Image:
    """Return the image, mirrored as often as is asked for."""
    import PIL.ImageOps

    if wanted.horizontal_flip and random.random() < wanted.horizontal_flip:
        image = PIL.ImageOps.mirror(image)
    if wanted.vertical_flip and random.random() < wanted.vertical_flip:
        image = PIL.ImageOps.flip(image)
    return image


def jittered(image: Image, wanted: ColorJitter, random: Random) -> Image:
    """Return the image with other colours."""
    import PIL.ImageEnhance

    changes = {
        PIL.ImageEnhance.Brightness: wanted.brightness,
        PIL.ImageEnhance.Contrast: wanted.contrast,
        PIL.ImageEnhance.Color: wanted.saturation,
        None: wanted.hue,
    }
    order = [list(changes)[i] for i in random.permutation(len(changes))]
    for enhancer in order:
        strength = changes[enhancer]
        if not strength:
            continue
        drawn = random.uniform(-strength, strength)
        image = turned_hue(image, drawn) if enhancer is None else enhancer(image).enhance(1 + drawn)
    return image


def turned_hue(image: Image, turn: float) -> Image:
    """Return the image with its hues turned. `turn`: a share of the colour circle, from -0.5 to 0.5."""
    import PIL.Image

    hue, saturation, value = image.convert("HSV").split()
    steps = int(turn * (HUES - 1)) % HUES
    hue = hue.point([(i + steps) % HUES for i in range(HUES)])
    return PIL.Image.merge("HSV", (hue, saturation, value)).convert("RGB")


Operation = Callable[["Image", float], "Image"]
"""(image, strength from -1 to 1) → the changed image."""


def rand_augmented(image: Image, wanted: RandAugment, random: Random) -> Image:
    """Return the image after `wanted.operations` operations at random."""
    operations = list(OPERATIONS.values())
    for _ in range(wanted.operations):
        operation = operations[random.integers(len(operations))]
        sign = 1 if random.random() < 0.5 else -1
        image = operation(image, sign * wanted.magnitude / MAGNITUDES)
    return image


def _moved(image: Image, matrix: tuple[float, ...]) -> Image:
    """Return the image with its pixels moved by an affine `matrix`; those from outside are black."""
    import PIL.Image

    return image.transform(image.size, PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.NEAREST)


def _enhanced(name: str) -> Operation:
    """Return the operation of the class `name` of PIL.ImageEnhance."""

    def operation(image: Image, strength: float) -> Image:
        import PIL.ImageEnhance

        enhanced: Image = getattr(PIL.ImageEnhance, name)(image).enhance(1 + 0.9 * strength)
        return enhanced

    return operation


def _posterized(image: Image, strength: float) -> Image:
    import PIL.ImageOps

    return PIL.ImageOps.posterize(image, 8 - round(4 * abs(strength)))


def _solarized(image: Image, strength: float) -> Image:
    import PIL.ImageOps

    threshold: Any = 255 * (1 - abs(strength))  # Pillow declares an integer and compares any number
    return PIL.ImageOps.solarize(image, threshold)


def _auto_contrasted(image: Image, strength: float) -> Image:
    import PIL.ImageOps

    return PIL.ImageOps.autocontrast(image)


def _equalized(image: Image, strength: float) -> Image:
    import PIL.ImageOps

    return PIL.ImageOps.equalize(image)


OPERATIONS: Mapping[str, Operation] = {
    "identity": lambda image, strength: image,
    "shear-x": lambda image, strength: _moved(image, (1, 0.3 * strength, 0, 0, 1, 0)),
    "shear-y": lambda image, strength: _moved(image, (1, 0, 0, 0.3 * strength, 1, 0)),
    "translate-x": lambda image, strength: _moved(image, (1, 0, int(FAR / WIDTH * image.width * strength), 0, 1, 0)),
    "translate-y": lambda image, strength: _moved(image, (1, 0, 0, 0, 1, int(FAR / WIDTH * image.height * strength))),
    "rotate": lambda image, strength: image.rotate(30 * strength),
    "brightness": _enhanced("Brightness"),
    "color": _enhanced("Color"),
    "contrast": _enhanced("Contrast"),
    "sharpness": _enhanced("Sharpness"),
    "posterize": _posterized,
    "solarize": _solarized,
    "autocontrast": _auto_contrasted,
    "equalize": _equalized,
}
"""Name → operation of RandAugment. identity, autocontrast and equalize have no strength."""
