"""What VAE and text encoders make of images and captions, computed once and kept in the workspace.

Of an image, mean and deviation of the latents are kept, so that a step draws latents anew, as without this. An attempt
that is stopped leaves what it has encoded, and the next one goes on from there. Each file is verified by its digest
before it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from luthier_trainer.models.pipelines import pixels_of_a_latent
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.tasks.base import Batch
from luthier_trainer.tasks.buckets import BUCKET, Size
from luthier_trainer.tasks.images import ROW
from luthier_trainer.workspace.manifest import replace_file, sha256

if TYPE_CHECKING:
    from datasets import Dataset

KEY = "identity.json"
FILE = "encodings"  # column: the file that has the encodings of a row
ENCODERS = ("text_encoder", "text_encoder_2")  # names of the components
FP32 = 4  # bytes
ROWS_A_FILE = 16  # between two of them the processes look whether they have to stop
MEAN, DEVIATION = "latents_mean", "latents_deviation"
HIDDEN, POOLED, TIME_IDS = "encoder_hidden_states", "text_embeds", "time_ids"  # the UNet's names
"""Names of encodings, each [images of a row, ...]: those of 1.5 and 2 have not the last two."""

Encode = Callable[[dict[str, Any]], Mapping[str, torch.Tensor]]
"""A row → its encodings."""


class KeptEncodings:
    """The encodings of all rows, in a folder that belongs to one identity of a run."""

    def __init__(self, folder: Path, loop: Any, dtype: torch.dtype) -> None:
        """`loop`: the trainer, a `training.resilience.Resilient`. `dtype`: of the text encoders."""
        self.folder, self.loop, self.ranks = folder, loop, loop.ranks
        identity = {**loop.identity, "dtype": str(dtype), "rows of a file": ROWS_A_FILE}
        self.key = json.dumps(identity, sort_keys=True, default=str).encode()
        self.ranks.decide(self._begin)

    def _begin(self) -> None:
        if (self.folder / KEY).exists() and (self.folder / KEY).read_bytes() == self.key:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        replace_file(self.folder / KEY, self.key)

    def of(self, rows: Dataset, name: str, encode: Encode) -> Dataset:
        """Return the numbers of `rows`, and the files with their encodings, which are computed where they lack.

        All processes call this function; each computes a part. `name`: of the rows, for files. Raises what the
        trainer's callbacks raise when the run has to stop.
        """
        files = [self.folder / f"{name}-{begin:012d}.safetensors" for begin in range(0, len(rows), ROWS_A_FILE)]
        mine = range(self.ranks.rank, len(files), self.ranks.count)
        sound = {i for of_rank in self.ranks.each(lambda: self._sound(files, mine)) for i in of_rank}
        if self.ranks.first and sound:
            print(f"encodings: {len(sound):,} of {len(files):,} files of {name} are kept from before", flush=True)
        for begin in range(0, len(files), self.ranks.count):
            lacking = [i for i in range(begin, min(begin + self.ranks.count, len(files))) if i not in sound]
            if not lacking:
                continue
            self.ranks.each(
                lambda lacking=lacking: [self._make(files[i], i, rows, encode) for i in mine if i in lacking]
            )
            if self.ranks.first:
                print(f"encodings: {max(lacking) + 1:,} of {len(files):,} files of {name}", flush=True)
            self.loop.callback_handler.on_prediction_step(self.loop.args, self.loop.state, self.loop.control)
        kept = rows.select_columns([column for column in (ROW, BUCKET) if column in rows.column_names])
        return kept.add_column(FILE, [str(files[i // ROWS_A_FILE]) for i in range(len(rows))])

    @staticmethod
    def _sound(files: Sequence[Path], mine: Sequence[int]) -> list[int]:
        """Return which of this process's files match their digests. Those that do not are removed."""
        found = []
        for i in mine:
            digest = digest_file(files[i])
            if files[i].exists() and digest.exists() and sha256(files[i], beat) == digest.read_text():
                found.append(i)
                continue
            if digest.exists():
                print(f"encodings: {files[i].name} is broken, and made again", flush=True)
            for file in (files[i], digest):
                file.unlink(missing_ok=True)
        return found

    @staticmethod
    def _make(file: Path, number: int, rows: Dataset, encode: Encode) -> None:
        """Encode the rows of a file and write it. `number`: of the file."""
        tensors: dict[str, torch.Tensor] = {}
        for i in range(number * ROWS_A_FILE, min((number + 1) * ROWS_A_FILE, len(rows))):
            row = rows[i]
            tensors |= {f"{row[ROW]}.{name}": tensor.cpu().contiguous() for name, tensor in encode(row).items()}
            beat()
        content = save(tensors)
        replace_file(file, content)
        replace_file(digest_file(file), hashlib.sha256(content).hexdigest().encode())


def digest_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def read_batch(rows: list[dict[str, Any]]) -> Batch:
    """Return a batch of `DiffusionTrainer` with encodings instead of images and captions.

    `rows`: of `KeptEncodings.of`. As in other batches, repetitions are left out, and the images of a class follow those
    to learn.
    """
    rows = list({row[ROW]: row for row in rows}.values())
    found: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        prefix = f"{row[ROW]}."
        with safe_open(row[FILE], "pt") as file:
            for name in file.keys():  # noqa: SIM118  # a file of safetensors cannot be iterated
                if name.startswith(prefix):
                    found.setdefault(name.removeprefix(prefix), []).append(file.get_tensor(name))
    batch = {name: torch.cat([*zip_images(tensors)]) for name, tensors in found.items()}
    return {**batch, ROW: torch.tensor([row[ROW] for row in rows])}


def zip_images(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the first images of all rows, [1, ...] each, then their second ones if there are such."""
    return [tensor[i : i + 1] for i in range(len(tensors[0])) for tensor in tensors]


def bytes_of(models: Mapping[str, Any], sizes: Sequence[Size], images: int, computed_bytes: int) -> int:
    """Return what the encodings of rows take of the workspace.

    `models`: of the pipeline. `sizes`: of the images of each row, `images` of them. `computed_bytes`: of a number that
    the text encoders compute.
    """
    unit, channels = pixels_of_a_latent(models["vae"]), models["vae"].config.latent_channels
    latents = sum(2 * FP32 * channels * (size.height // unit) * (size.width // unit) for size in sizes)
    configs = [models[name].config for name in ENCODERS if name in models]
    texts = configs[0].max_position_embeddings * sum(config.hidden_size for config in configs)
    return images * (latents + len(sizes) * texts * computed_bytes)
