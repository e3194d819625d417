"""The images and the audio that rows of the inputs hold: each file once in the workspace, by the SHA-256 of its
content.

`prepare` reads and stores them, and a row names them by that digest. So an output depends on the content of a file, and
neither on its name nor on what becomes of it afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.records import digest
from luthier_trainer.workspace.manifest import place_file

if TYPE_CHECKING:
    import PIL.Image

ORIENTATION = 0x0112  # tag of Exif
SIDEWAYS = range(5, 9)  # its values for images that are turned by 90 degrees


class InputFiles:
    """The files of one kind that the rows of a job hold."""

    name: ClassVar[str]
    """Of their folder in what `prepare` leaves."""

    def __init__(self, folder: WorkspaceFolder) -> None:
        self.folder = folder.prepared / self.name

    def path(self, name: str) -> Path:
        """Return the path of the file with the SHA-256 `name`."""
        return self.folder / name[:2] / name

    def keep(self, content: bytes) -> str:
        """Store a file, and return its SHA-256."""
        name = digest(content)
        path = self.path(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            place_file(path, content)
        return name


class Recordings(InputFiles):
    """The audio files of a job."""

    name = "audio"

    def content(self, name: str) -> bytes:
        """Return the file with the SHA-256 `name`."""
        return self.path(name).read_bytes()


class Pictures(InputFiles):
    """The image files of a job."""

    name = "images"

    def opened(self, name: str, mode: str = "RGB") -> PIL.Image.Image:
        """Return an image upright, in a mode of Pillow."""
        import PIL.Image
        import PIL.ImageOps

        with PIL.Image.open(self.path(name)) as image:
            return PIL.ImageOps.exif_transpose(image).convert(mode)

    def size(self, name: str) -> tuple[int, int]:
        """Return the width and the height of an image that is upright. Reads no pixels."""
        import PIL.Image

        with PIL.Image.open(self.path(name)) as image:
            turned = image.getexif().get(ORIENTATION, 1) in SIDEWAYS
            return (image.height, image.width) if turned else image.size
