"""How the training images of a classifier are changed at random: the block `training.augmentation`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from luthier_api.base import ApiModel, Rule

Range = Annotated[list[float], Field(min_length=2, max_length=2)]
Chance = Annotated[float | None, Field(gt=0, le=1)]


class RandomCrop(ApiModel):
    """A part of the image at random, scaled to the size that the model reads, as torchvision's RandomResizedCrop."""

    scale: Range = [0.08, 1.0]
    """Least and largest share of the image's area."""
    ratio: Range = [0.75, 1.3333]
    """Least and largest width divided by height."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "0.0 < self.scale[0] && self.scale[0] <= self.scale[1] && self.scale[1] <= 1.0",
            "crop.scale: is a least and a largest share of the area, such as [0.08, 1.0]; 0 < least ≤ largest ≤ 1",
        ),
        Rule(
            "0.01 <= self.ratio[0] && self.ratio[0] <= self.ratio[1] && self.ratio[1] <= 100.0",
            "crop.ratio: is a least and a largest width / height, such as [0.75, 1.3333]; 0.01 ≤ least ≤ largest ≤ 100",
        ),
    )


class ColorJitter(ApiModel):
    """Colours that change at random, in random order, as torchvision's ColorJitter."""

    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Brightness is multiplied by a number between 1 - brightness and 1 + brightness."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same for contrast."""
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same for saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Hue is turned by a number between -hue and hue, as a share of the colour circle."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.brightness > 0.0 || self.contrast > 0.0 || self.saturation > 0.0 || self.hue > 0.0",
            "colorJitter: changes nothing; set brightness, contrast, saturation or hue, or remove it",
        ),
    )


class RandAugment(ApiModel):
    """Operations from a list of fourteen, at random (arXiv:1909.13719), with the strengths of torchvision."""

    operations: Annotated[int, Field(ge=1, le=14)] = 2
    """Operations for an image, one after the other."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """How strong they are."""


class Augmentation(ApiModel):
    """How training images are changed at random. Which changes keep the label of an image, only you know: a mirrored 2
    is no 2. Held-out images are never changed.
    """

    crop: RandomCrop | None = None
    horizontal_flip: Chance = None
    """How often an image is mirrored, left to right."""
    vertical_flip: Chance = None
    """How often an image is turned upside down."""
    rand_augment: RandAugment | None = None
    color_jitter: ColorJitter | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.crop) || has(self.horizontalFlip) || has(self.verticalFlip) || has(self.randAugment) ||"
            " has(self.colorJitter)",
            "augmentation: changes nothing; set crop, horizontalFlip, verticalFlip, randAugment or colorJitter, or"
            " remove it",
        ),
    )
