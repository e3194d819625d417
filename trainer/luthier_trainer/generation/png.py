"""Writes PNG files of RGB images about ten times as fast as Pillow's defaults, in files of the same size.

Pillow tries five filters for each line of pixels. Here each line is the difference to the one above it, and zlib looks
for repeats of one byte only (Z_RLE): the noise of photographs has no longer ones, and plain areas become zeros.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BITS, RGB, UP = 8, 2, 2
"""Bits of a channel, the type of the colours, and the filter of a line, by their numbers in the specification."""
MEMORY_LEVEL = 9  # the largest buffers of zlib


def png(pixels: numpy.ndarray[Any, Any], chunks: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Return a PNG of uint8 [height, width, 3]. `chunks`: type and content of further ones, such as those of texts."""
    height, width, channels = pixels.shape
    lines = pixels.reshape(height, width * channels)
    filtered = numpy.empty((height, width * channels + 1), numpy.uint8)
    filtered[:, 0] = UP
    filtered[0, 1:] = lines[0]
    numpy.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, MEMORY_LEVEL, zlib.Z_RLE)
    data = compressor.compress(filtered.data) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, BITS, RGB, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return SIGNATURE + b"".join(_chunk(name, content) for name, content in every)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
