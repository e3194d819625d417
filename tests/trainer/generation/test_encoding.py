"""Files of images: what readers of their metadata find in them, in each format, and what is left out."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
from PIL import ExifTags, Image
from trainer.generating import sample

from luthier_api.task_settings import ImageSettings
from luthier_api.tasks import GENERATION_TASKS
from luthier_trainer.generation.encoding import FORMATS, SOURCE_TYPES, About, encode
from luthier_trainer.generation.samples import Unusable

ABOUT = About(
    {
        "task": "text-to-image",
        "model": {"source": "org/lutes, large", "revision": "0123abcd"},
        "adapters": [{"source": "org/ink", "weight": 0.5, "sha256": "ff"}],
        "steps": 20,
    },
    "torch 2.13, cpu",
)
SAMPLE = sample("eine Laute, schön\nim Licht: 琵琶", row=3, index=1, negative="rain, people")
IMAGE = {"scheduler": "dpm++2m", "sigmas": "karras", "steps": 20, "guidance": 6.5, "width": 8, "height": 8}


def settings(**more: Any) -> ImageSettings:
    return ImageSettings.model_validate(IMAGE | more)


def saved(**more: Any) -> Image.Image:
    content = encode(Image.new("RGB", (8, 8), (200, 20, 20)), settings(**more), SAMPLE, ABOUT)
    return Image.open(io.BytesIO(content))


def comment(image: Image.Image) -> str | None:
    """The text that web UIs read: a chunk of a PNG, or UserComment, which names its encoding in eight bytes."""
    if image.format == "PNG":
        return image.info.get("parameters")
    content = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    return content.removeprefix(b"UNICODE\0").decode("utf-16-be") if content else None


def described(image: Image.Image) -> str | None:
    return image.info.get("luthier") if image.format == "PNG" else image.getexif().get(ExifTags.Base.ImageDescription)


# As in the web UI of AUTOMATIC1111 (modules/infotext_utils.py), which others have taken over.
ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read(text: str) -> dict[str, str]:
    """The entries of a text, as that web UI reads them."""
    *lines, last = text.strip().split("\n")
    found, into = {"Prompt": "", "Negative prompt": ""}, "Prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            into, line = "Negative prompt", line[len("Negative prompt:") :].strip()
        found[into] += ("\n" if found[into] else "") + line
    for name, value in ENTRY.findall(last):
        found[name] = json.loads(value) if value.startswith('"') else value
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_web_uis_find_how_an_image_was_made(form: str) -> None:
    text = comment(saved(format=form))
    assert text
    assert read(text) == {
        "Prompt": SAMPLE.prompt,
        "Negative prompt": "rain, people",
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "6.5",
        "Seed": "7",
        "Size": "8x8",
        "Model": "org/lutes, large @ 0123abcd",
        "Lora weights": "org/ink: 0.5",
        "Version": "Luthier",
    }


@pytest.mark.parametrize("form", FORMATS)
def test_the_json_says_all_that_the_image_depends_on(form: str) -> None:
    """And not the row: the same prompt and seed give the same bytes, wherever they stand."""
    text = described(saved(format=form))
    assert text
    found = json.loads(text)
    assert len(found.pop("settingsSha256")) == 64
    assert found == {
        "prompt": SAMPLE.prompt,
        "negativePrompt": "rain, people",
        "seed": 7,
        "settings": ABOUT.settings,
        "environment": "torch 2.13, cpu",
    }


@dataclass(frozen=True)
class Switch:
    name: str
    metadata: list[str]
    parameters: bool
    luthier: bool
    xmp: bool


SWITCHES = [
    Switch(
        name="none",
        metadata=[],
        parameters=False,
        luthier=False,
        xmp=False,
    ),
    Switch(
        name="parameters",
        metadata=["parameters"],
        parameters=True,
        luthier=False,
        xmp=False,
    ),
    Switch(
        name="JSON",
        metadata=["luthier"],
        parameters=False,
        luthier=True,
        xmp=False,
    ),
    Switch(
        name="XMP",
        metadata=["xmp"],
        parameters=False,
        luthier=False,
        xmp=True,
    ),
]


@pytest.mark.parametrize("case", SWITCHES, ids=lambda case: case.name)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_switched_off_is_not_there(form: str, case: Switch) -> None:
    image = saved(format=form, metadata=case.metadata)
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    assert ((comment(image) is not None), (described(image) is not None)) == (case.parameters, case.luthier)
    assert ("trainedAlgorithmicMedia" in str(xmp)) is case.xmp
    if not case.metadata:
        assert not image.getexif()


@dataclass(frozen=True)
class Marked:
    name: str
    task: str
    model: dict[str, str]
    expect: dict[str, str]


MARKED = [
    Marked(
        name="a model of the Hub",
        task="text-to-image",
        model={"source": "org/lutes", "revision": "0123abcd"},
        expect={
            "DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
            "AISystemUsed": "org/lutes",
            "AISystemVersionUsed": "0123abcd",
        },
    ),
    Marked(
        name="a folder whose name XML has to escape, or cannot express",
        task="image-to-image",
        model={"source": "/models/<a> & \"b\" 'c' 琵琶\x01"},
        expect={
            "DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia",
            "AISystemUsed": "/models/<a> & \"b\" 'c' 琵琶?",
        },
    ),
]
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@pytest.mark.parametrize("case", MARKED, ids=lambda case: case.name)
@pytest.mark.parametrize("form", FORMATS)
def test_xmp_says_that_a_model_made_the_image(form: str, case: Marked) -> None:
    """Read by Pillow and a parser of XML, in files whose pixels and bytes do not change for it."""
    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=numpy.uint8))
    about = About({"task": case.task, "model": case.model, "adapters": []}, "here")
    plain, marked, again = (
        encode(image, settings(format=form, metadata=metadata), SAMPLE, about) for metadata in ([], ["xmp"], ["xmp"])
    )
    assert marked == again
    opened = Image.open(io.BytesIO(marked))
    assert numpy.array_equal(numpy.asarray(opened), numpy.asarray(Image.open(io.BytesIO(plain))))
    description = ElementTree.fromstring(opened.info["xmp"]).find(f"{RDF}RDF/{RDF}Description")
    assert description is not None
    found = dict(description.attrib)
    assert found.pop(f"{RDF}about") == ""
    assert found.pop("{http://ns.adobe.com/xap/1.0/}CreatorTool") == f"Luthier {version('luthier')}"
    assert found == {IPTC + name: value for name, value in case.expect.items()}


def test_each_task_that_makes_images_says_how_a_model_takes_part() -> None:
    assert set(SOURCE_TYPES) == {name for name, task in GENERATION_TASKS.items() if task.settings == "image"}


def test_a_jpeg_has_no_room_for_prompts_of_any_length() -> None:
    long = sample("x" * 70_000)
    image = Image.new("RGB", (8, 8))
    with pytest.raises(Unusable, match=r"set image\.format: png or image\.metadata: \[\]"):
        encode(image, settings(format="jpeg"), long, ABOUT)
    assert encode(image, settings(format="jpeg", metadata=[]), long, ABOUT)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (64, 64)])
def test_a_png_has_the_pixels_that_were_given(size: tuple[int, int]) -> None:
    """Pillow reads it, and checks the sums of all chunks."""
    random = numpy.random.default_rng(0)
    for pixels in (random.integers(0, 256, (*size, 3), dtype=numpy.uint8), numpy.full((*size, 3), 200, numpy.uint8)):
        content = encode(Image.fromarray(pixels), settings(), SAMPLE, ABOUT)
        Image.open(io.BytesIO(content)).verify()
        assert numpy.array_equal(numpy.asarray(Image.open(io.BytesIO(content))), pixels)


def test_plain_areas_take_no_room() -> None:
    content = encode(Image.new("RGB", (512, 512), (200, 20, 20)), settings(metadata=[]), SAMPLE, ABOUT)
    assert len(content) < 512 * 512 * 3 / 200
