"""Encodes images as files of the format that the user chose, with metadata on how they were made.

`parameters` is the text that web UIs for Stable Diffusion write and read: a chunk of a PNG, or UserComment of EXIF.
`luthier` is JSON: a chunk of a PNG, or ImageDescription of EXIF. `xmp` is a packet of XMP. None of them names the row,
so that the same prompt and seed give the same bytes, independent of their position in the inputs.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy
from PIL import ExifTags
from PIL.Image import Exif, Image
from PIL.PngImagePlugin import PngInfo

from luthier_api.samplers import SAMPLERS
from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation.png import png
from luthier_trainer.generation.samples import Sample, Unusable


@dataclass(frozen=True)
class ImageFormat:
    """How a format of `image.format` is written: with which options of Pillow, but for PNG."""

    suffix: str
    options: dict[str, Any]


# Measured with photographs of 1024 × 1024 on one core (docs/benchmarks.md).
FORMATS: Mapping[str, ImageFormat] = {
    "png": ImageFormat("png", {}),  # written by `png`
    "webp": ImageFormat("webp", {"lossless": True, "method": 0}),
    "jpeg": ImageFormat("jpg", {"quality": 95}),
}
EXIF_BYTES = 65_000  # of a JPEG, whose segment for it ends at 64 KiB
XMP_CHUNK = "XML:com.adobe.xmp"
"""Keyword of the chunk of a PNG that holds XMP."""
XMP_SPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
"""Prefix → namespace, of what is written as XMP."""
SOURCE_TYPES: Mapping[str, str] = {
    "text-to-image": "trainedAlgorithmicMedia",
    "image-to-image": "compositeWithTrainedAlgorithmicMedia",
}
"""Task → how a model takes part in its images, by the codes of IPTC (DigitalSourceType)."""
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""A character that XML cannot express."""
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>',  # the same in every packet, by the specification
    '<?xpacket end="w"?>',
)
"""What stands before and after XMP, by which it is found in a file of any format."""


@dataclass(frozen=True)
class About:
    """What all images of a job have in common, besides `ImageSettings`."""

    settings: Mapping[str, Any]
    """As in the lines of the outputs."""
    environment: str
    """Versions of the libraries and the device."""

    @property
    def model(self) -> str:
        """The model's name and revision."""
        model = self.settings["model"]
        return f"{model['source']} @ {model['revision']}" if model.get("revision") else str(model["source"])


def encode(image: Image, settings: ImageSettings, sample: Sample, about: About) -> bytes:
    """Return the content of the file. Raises Unusable if the metadata is too long for the format."""
    texts = {
        "parameters": parameters(settings, sample, about) if "parameters" in settings.metadata else "",
        "luthier": as_json(sample, about) if "luthier" in settings.metadata else "",
    }
    given = {name: text for name, text in texts.items() if text}
    xmp = xmp_packet(about) if "xmp" in settings.metadata else b""
    if settings.format == "png":
        return png(numpy.asarray(image), _png_chunks(given, xmp))
    options = FORMATS[settings.format].options | _segments(given, xmp)
    if settings.format == "jpeg" and len(options.get("exif", b"")) > EXIF_BYTES:
        raise Unusable(
            "the prompts are too long for the metadata of a JPEG; set image.format: png or image.metadata: []"
        )
    file = io.BytesIO()
    image.save(file, format=settings.format, **options)
    return file.getvalue()


def _png_chunks(texts: Mapping[str, str], xmp: bytes) -> list[tuple[bytes, bytes]]:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    if xmp:
        info.add_itxt(XMP_CHUNK, xmp.decode())
    return [(name, content) for name, content, *_ in info.chunks]


def _segments(texts: Mapping[str, str], xmp: bytes) -> dict[str, Any]:
    """Return the options of Pillow for metadata of a JPEG or WebP."""
    exif = Exif()
    if "luthier" in texts:
        exif[ExifTags.Base.ImageDescription] = texts["luthier"]
    if "parameters" in texts:
        comment = b"UNICODE\0" + texts["parameters"].encode("utf-16-be")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return ({"exif": exif.tobytes()} if texts else {}) | ({"xmp": xmp} if xmp else {})


def xmp_packet(about: About) -> bytes:
    """Return the XMP of an image: that a model has made it or a part of it, which one, and with which program.

    It has no time, so that the same image has the same bytes.
    """
    model = about.settings["model"]
    facts = {
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE + SOURCE_TYPES[about.settings["task"]],
        "Iptc4xmpExt:AISystemUsed": model["source"],
        "Iptc4xmpExt:AISystemVersionUsed": model.get("revision"),
        "xmp:CreatorTool": f"Luthier {version('luthier')}",
    }
    spaces = {prefix: f'xmlns:{prefix}="{space}"' for prefix, space in XMP_SPACES.items()}
    listed = " ".join(f"{name}={quoteattr(NO_XML.sub('?', str(value)))}" for name, value in facts.items() if value)
    begin, end = PACKET
    return (
        f"{begin}<x:xmpmeta {spaces['x']}><rdf:RDF {spaces['rdf']}>"
        f'<rdf:Description rdf:about="" {spaces["xmp"]} {spaces["Iptc4xmpExt"]} {listed}/>'
        f"</rdf:RDF></x:xmpmeta>{end}"
    ).encode()


def as_json(sample: Sample, about: About) -> str:
    """Return how an image was made, as JSON in ASCII, which EXIF wants."""
    own = {name: value for name, value in sample.facts().items() if name not in ("row", "sample", "id", "settings")}
    settings = {**about.settings, **(sample.overrides or {})}
    text = json.dumps(settings, sort_keys=True)
    facts = {
        **own,
        "settings": settings,
        "settingsSha256": hashlib.sha256(text.encode()).hexdigest(),
        "environment": about.environment,
    }
    return json.dumps(facts)


def parameters(settings: ImageSettings, sample: Sample, about: About) -> str:
    """Return how an image was made, in the text format that web UIs for Stable Diffusion parse."""
    sampler = settings.scheduler if settings.scheduler == "default" else SAMPLERS[settings.scheduler].title
    entries: dict[str, object] = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "Schedule type": settings.sigmas and settings.sigmas.capitalize(),
        "CFG scale": settings.guidance,
        "CFG Rescale": settings.guidance_rescale or None,
        "Denoising strength": settings.strength,
        "Seed": sample.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": about.model,
        "Lora weights": _adapters(about),
        "Version": "Luthier",
    }
    negative = f"\nNegative prompt: {sample.negative_prompt}" if sample.negative_prompt else ""
    shown = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in entries.items() if value is not None)
    return f"{sample.prompt}{negative}\n{shown}"


def _adapters(about: About) -> str | None:
    found = [f"{adapter['source']}: {adapter['weight']:g}" for adapter in about.settings["adapters"]]
    return ", ".join(found) or None


def _quoted(value: str) -> str:
    """Return a value as readers split it: in quotes if it has a comma, a colon or a line break."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
