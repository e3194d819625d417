"""Images a second of a GenerateJob beside loops without Luthier, and files a core-second beside Pillow's default.

`PYTHONPATH=tests python -m perf images` prints one JSON document. The model is a small Stable Diffusion XL from its
configuration (64 × 64, 20 steps, guidance 5, fp32, two threads). Three contestants take turns, so that other load
hits all of them: a plain loop of diffusers, one prompt at a time, which saves each image with Pillow's defaults; our
engine's batches alone, which store nothing; and a shard as it is, durable, with metadata and ledger.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

PROMPTS, ROUNDS, BATCH, THREADS = 64, 4, 8, 2
IMAGE = {"width": 64, "height": 64, "steps": 20, "guidance": 5.0, "scheduler": "euler"}
SIDE, FILES = 1024, 4


def main() -> dict[str, Any]:
    """The figures of both comparisons."""
    torch.set_num_threads(THREADS)
    return {"images": jobs(), "files": files()}


def jobs() -> dict[str, Any]:
    from trainer.generating import image_engine, sample
    from trainer.small_sdxl import write_small_sdxl

    from luthier_api.task_settings import ImageSettings
    from luthier_api.workspace import WorkspaceFolder
    from luthier_trainer.generation.ledger import Shard
    from luthier_trainer.generation.main import make
    from luthier_trainer.generation.samples import Sample, padded
    from luthier_trainer.runtime.telemetry import Telemetry

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["LUTHIER_RUN_DIR"] = name
        folder = write_small_sdxl(root / "sdxl")
        plain = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        plain.set_progress_bar_config(disable=True)
        engine = image_engine(folder, IMAGE, BATCH)
        settings = ImageSettings.model_validate(IMAGE)
        samples = [sample(f"lute number {i} on a workbench", row=i, seed=i, settings=settings) for i in range(PROMPTS)]

        def loop(part: list[Sample], number: int) -> None:
            for one in part:
                given = {"num_inference_steps": IMAGE["steps"], "guidance_scale": IMAGE["guidance"]}
                size = {"width": IMAGE["width"], "height": IMAGE["height"]}
                noise = torch.Generator().manual_seed(one.seed or 0)
                plain(one.prompt, generator=noise, **given, **size).images[0].save(root / f"{one.row}.png")

        def raw(part: list[Sample], number: int) -> None:
            for first in range(0, len(part), BATCH):
                engine.make(padded(part[first : first + BATCH], BATCH))

        def job(part: list[Sample], number: int) -> None:
            folder, settings = WorkspaceFolder(root / f"job{number}"), {"task": "text-to-image"}
            shard = Shard(folder, 0, 1, engine.records, range(len(part)), settings, "here")
            shard.resume()
            make(engine, shard, (replace(one, number=i) for i, one in enumerate(part)), Telemetry(), None)
            shard.finish({"rows": len(part), "failedRows": 0})

        contestants: dict[str, Callable[[list[Sample], int], None]] = {"plain loop": loop, "batches": raw, "job": job}
        for one in contestants.values():  # warm up
            one(samples[:BATCH], -1)
        pace: dict[str, list[float]] = {name: [] for name in contestants}
        cores: dict[str, list[float]] = {name: [] for name in contestants}
        each = PROMPTS // ROUNDS
        for number in range(ROUNDS):
            for name, one in contestants.items():
                engine.prompts_for(samples[0]).kept.clear()
                started, used = time.perf_counter(), time.process_time()
                one(samples[number * each : (number + 1) * each], number)
                pace[name].append(each / (time.perf_counter() - started))
                cores[name].append(each / (time.process_time() - used))
    return {
        "prompts": PROMPTS,
        "batchSize": BATCH,
        "threads": THREADS,
        "images a second": {name: round(statistics.median(found), 2) for name, found in pace.items()},
        "job / plain loop": ratio(pace["job"], pace["plain loop"]),
        "job / batches": ratio(pace["job"], pace["batches"]),
        "job / plain loop, images a core-second": ratio(cores["job"], cores["plain loop"]),
        "job / batches, images a core-second": ratio(cores["job"], cores["batches"]),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median and span of the ratios of the rounds."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": round(statistics.median(found), 3), "least": round(min(found), 3), "most": round(max(found), 3)}


def files() -> dict[str, Any]:
    """Files of photographs written in a second of one core, metadata included, beside `image.save()`."""
    from trainer.generating import sample

    from luthier_api.task_settings import ImageSettings
    from luthier_trainer.generation.encoding import FORMATS, About, encode

    about = About({"model": {"source": "org/lutes", "revision": "abc"}, "adapters": []}, "here")
    pictures = [photograph(seed) for seed in range(FILES)]

    def default(picture: Image.Image) -> bytes:
        file = io.BytesIO()
        picture.save(file, "png")
        return file.getvalue()

    def ours(form: str) -> Callable[[Image.Image], bytes]:
        settings = ImageSettings.model_validate({"format": form})
        return lambda picture: encode(picture, settings, sample("a lute", settings=settings), about)

    ways = {"image.save()": default, **{form: ours(form) for form in FORMATS}}
    taken: dict[str, float] = dict.fromkeys(ways, 0.0)
    size: dict[str, int] = dict.fromkeys(ways, 0)
    for picture in pictures:
        for name, way in ways.items():
            started = time.process_time()
            size[name] += len(way(picture))
            taken[name] += time.process_time() - started
    return {
        name: {
            "files a core-second": round(FILES / taken[name], 2),
            "beside image.save()": round(taken["image.save()"] / taken[name], 2),
            "bytes": size[name] // FILES,
        }
        for name in ways
    }


def photograph(seed: int) -> Image.Image:
    """Smooth light with the grain of a sensor, which compresses like a photograph: 12 bits a pixel as PNG."""
    random = numpy.random.default_rng(seed)
    coarse = random.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
    smooth = numpy.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=numpy.float32)
    grain = random.normal(0, 3, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(numpy.uint8))


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
