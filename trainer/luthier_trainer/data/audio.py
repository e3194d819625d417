"""Reads audio files: WAV, FLAC, MP3 and what else libsndfile knows, as one channel at the sampling rate of a model.

Rows hold the files as they are. As samples they would take up to twenty times the space.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from math import ceil, gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_trainer.runtime.classify import FORBIDDEN_ERRNOS, STORAGE_ERRNOS, os_error

if TYPE_CHECKING:
    import numpy

SECONDS_AT_ONCE = 30  # that are decoded together when a file is checked
SLACK_SECONDS = 0.1  # that headers of MP3 and Ogg may promise too much


class BadAudio(ValueError):
    """Why audio cannot be used."""


@dataclass(frozen=True)
class Clip:
    """What the header of an audio file says."""

    rate: int
    """Samples a second, of each channel."""
    channels: int
    samples: int
    """Of each channel."""
    silent: bool = False
    """Whether all samples are the same, as far as they have been decoded."""

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def samples_at(self, rate: int) -> int:
        """Return the samples that it has at another rate."""
        return ceil(self.samples * rate / self.rate)


def content(cell: Any, folder: Path | None) -> bytes:
    """Return the audio file in a cell: a path, the file itself, or both as `datasets` stores them.

    `folder`: what paths are relative to; None: to nothing. Raises BadAudio if there is none.
    """
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if not cell:
        raise BadAudio("there is none")
    if isinstance(cell, bytes):
        return cell
    path = Path(cell)
    if not path.is_absolute():
        if folder is None:
            raise BadAudio("is no path from / on; write the whole path inside the pods")
        path = folder / path
    try:
        found = path.read_bytes()
    except OSError as error:
        if os_error(error, STORAGE_ERRNOS | FORBIDDEN_ERRNOS):
            raise  # an error of the volume or its permissions, not of the row
        raise BadAudio(str(error.strerror)) from None
    if not found:
        raise BadAudio("the file is empty")
    return found


def name_of(cell: Any) -> str | None:
    """Return the path in a cell, as the data have it."""
    if isinstance(cell, dict):
        cell = cell.get("path")
    return cell if isinstance(cell, str) and cell else None


def clip_of(file: bytes) -> Clip:
    """Return what the header of an audio file says. Raises BadAudio if it is no audio."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(file)) as opened:
            return Clip(opened.samplerate, opened.channels, opened.frames)
    except soundfile.SoundFileError as error:
        raise BadAudio(f"it cannot be read as audio ({reason(error)})") from None


def check(file: bytes) -> Clip:
    """Decode an audio file, and return what it holds. Raises BadAudio if no model could learn from it."""
    import numpy
    import soundfile

    clip = clip_of(file)
    found, lowest, highest = 0, numpy.inf, -numpy.inf
    try:
        with soundfile.SoundFile(io.BytesIO(file)) as opened:
            for block in opened.blocks(SECONDS_AT_ONCE * clip.rate, dtype="float32"):
                found += len(block)
                if not numpy.isfinite(block).all():
                    raise BadAudio("it has samples that are no finite numbers")
                lowest, highest = min(lowest, block.min()), max(highest, block.max())
    except soundfile.SoundFileError as error:
        raise BadAudio(f"it breaks off after {found / clip.rate:.1f} s ({reason(error)})") from None
    if not found:
        raise BadAudio("it has no samples")
    if clip.samples - found > SLACK_SECONDS * clip.rate:
        raise BadAudio(f"it breaks off after {found / clip.rate:.1f} s of {clip.seconds:.1f} s")
    return replace(clip, samples=found, silent=bool(lowest == highest))


def samples(file: bytes, rate: int, seconds: float) -> numpy.ndarray:
    """Return the samples of an audio file, float32 [samples]: one channel at `rate`, of `seconds` at most."""
    import soundfile
    from scipy.signal import resample_poly

    with soundfile.SoundFile(io.BytesIO(file)) as opened:
        own = opened.samplerate
        channels = opened.read(ceil(seconds * own), dtype="float32", always_2d=True)
    mono = channels.mean(axis=1)
    if own != rate:
        common = gcd(own, rate)
        mono = resample_poly(mono, rate // common, own // common).astype("float32")
    return mono[: round(seconds * rate)]


def reason(error: Exception) -> str:
    """Return the message of a decoder in one line."""
    return " ".join(str(getattr(error, "error_string", error)).split())[:200].rstrip(".")
