"""`luthier bench generate`: how fast a GenerateJob is, and which share of the device's operations it uses.

Outputs are made as a shard makes them: by the engine of the job, encoded, and stored durably with their ledger. While
they are made for the first time, torch counts the floating-point operations; then they are timed. The limit is the
product of two matrices in the precision of the job, on the same device, timed between the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun, PreparedRecord, read_run
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.bench.cases import MODELS, SEED, make_model, words
from luthier_trainer.bench.comparison import Device, device, surroundings
from luthier_trainer.bench.rounds import Unmeasured, prepare, rounded
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from luthier_trainer.generation.engines.base import Engine
    from luthier_trainer.generation.hardware import Hardware
    from luthier_trainer.generation.samples import Sample

MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
"""Device → rows and columns of the matrices, enough to keep it busy."""
PRODUCTS = 10  # of which the fastest counts, at each time
PROMPT_WORDS = (4, 64)  # of the texts of a case, from and to


@dataclass(frozen=True)
class Made:
    """What one round has made."""

    seconds: float
    lines: list[dict[str, Any]]
    """The lines of its outputs, as they were stored."""

    @property
    def outputs(self) -> int:
        """Outputs that could be made."""
        return sum(line["error"] is None for line in self.lines)

    @property
    def tokens(self) -> int:
        """Tokens of the texts that were written."""
        return sum(line.get("newTokens") or 0 for line in self.lines)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="luthier bench generate", description=__doc__)
    parser.add_argument("--run", type=Path, help="run config of a GenerateJob, instead of the options of a case")
    parser.add_argument("--model-config", choices=sorted(MODELS), default="tiny", help="of a case: texts by this model")
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0, help="of a case")
    parser.add_argument("--batch-size", type=int, default=8, help="of a case")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a case: tokens of a text")
    parser.add_argument("--outputs", type=int, help="the first outputs of the job that are made; two batches")
    parser.add_argument("--rounds", type=int, default=3, help="how often they are made, after the first time")
    parser.add_argument("--seconds", type=float, default=1800, help="the most that the phase prepare may take")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Measure, print the document, and return the exit code."""
    options = arguments(given)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        os.environ |= {Variables.RUN_DIR: folder, "HF_HUB_OFFLINE": "1"}
        try:
            run = job(options, root)
            found = device(gpu=run.spec.resources.gpus > 0)
            record = prepare(run, root / "prepare", time.monotonic() + options.seconds)
            with redirect_stdout(sys.stderr):
                document = measure(run, record, root, options.outputs or 2 * run.spec.batch_size, options.rounds, found)
        except (Unmeasured, Failure) as error:
            print(error, file=sys.stderr)
            return int(error.code if isinstance(error, Failure) else ExitCode.TRAINING_ERROR)
    print(json.dumps(document, indent=1))
    return 0


def job(options: argparse.Namespace, root: Path) -> GenerateRun:
    """Return the job to measure, in a workspace below `root`: that of `--run`, or texts by a model of random weights.

    Raises Unmeasured.
    """
    here = {"workspace": str(root / "job"), "metrics_port": 0}
    if options.run:
        run = read_run(options.run.read_bytes())
        assert isinstance(run, GenerateRun), "the command has checked the kind"
        alone = run.spec.model_copy(update={"shards": 1, "hub": None})
        return run.model_copy(update={**here, "spec": alone})
    make_model(options.model_config, root / "model", cpu=not options.gpus)
    random = numpy.random.default_rng(SEED)
    count = options.outputs or 2 * options.batch_size
    prompts = [words(random, int(length)) for length in random.integers(*PROMPT_WORDS, count)]
    (root / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    spec = {
        "task": "text-generation",
        "model": {"path": str(root / "model")},
        "inputs": {"dataset": {"files": [str(root / "prompts.txt")]}},
        "text": {"maxNewTokens": options.new_tokens},
        "batchSize": options.batch_size,
        "resources": {"gpus": options.gpus},
    }
    return GenerateRun.model_validate({"name": "bench", "workspace": here["workspace"], "metricsPort": 0, "spec": spec})


def measure(
    run: GenerateRun, record: PreparedRecord, root: Path, outputs: int, rounds: int, found: Device
) -> dict[str, Any]:
    """Return the figures of the first `outputs` outputs of a job that is prepared.

    `root`: a folder for what is made. Raises Failure if the job cannot run, and Unmeasured if no output can be made.
    """
    import torch

    from luthier_trainer.generation.engines.table import engine_class
    from luthier_trainer.generation.hardware import find_hardware
    from luthier_trainer.generation.overrides import with_overrides
    from luthier_trainer.generation.rows import Samples

    began, spec, hardware = time.monotonic(), run.spec, find_hardware(run.spec)
    count = min(outputs, record.dataset.outputs or 0)
    # As a shard of this many outputs would do it.
    size = min(spec.batch_size, count)
    rows = Samples(Path(record.dataset_path), spec.settings, spec.per_prompt, with_overrides)
    samples = list(rows.between(0, count))
    engine = engine_class(spec.task).load(run, record, hardware, size)
    loaded = time.monotonic() - began
    first, operations = counted(engine, samples, root / "counted", spec.task)
    if not first.outputs:
        raise Unmeasured(f"spec.inputs: none of the first {count} outputs can be made: {first.lines[0]['error']}")
    limits, made = [product_rate(hardware)], []
    for number in range(rounds):
        made.append(make_all(engine, samples, root / f"round-{number}", spec.task))
        limits.append(product_rate(hardware))
    seconds = statistics.median(one.seconds for one in made)
    rates = {"outputsPerSecond": first.outputs / seconds}
    if engine.records.has_files:
        rates["imagesPerSecond"] = first.outputs / seconds
    if first.tokens:
        rates["tokensPerSecond"] = first.tokens / seconds
    rate = operations / seconds
    side = MATRIX_SIDES[hardware.device]
    limit: dict[str, Any] = {
        "is": f"the product of two matrices of {side} × {side} in {hardware.precision}, measured",
        "flopsPerSecond": rounded(max(limits)),
    }
    shares = {"shareOfLimit": rate / max(limits)}
    if (stated := peak_of(run, found)) and hardware.precision != "fp32":
        limit["statedFlopsPerSecond"] = stated
        shares["shareOfStated"] = rate / stated
    threads = f"CPU, {torch.get_num_threads()} threads"
    return {
        **surroundings(found if spec.resources.gpus else Device(threads)),
        "task": spec.task,
        "precision": hardware.precision,
        "batchSize": size,
        "outputs": count,
        "failed": count - first.outputs,
        "rounds": rounds,
        "secondsOfLoading": rounded(loaded),
        "secondsOfRounds": [rounded(one.seconds) for one in made],
        **{name: rounded(value) for name, value in rates.items()},
        "flopsPerOutput": rounded(operations / first.outputs),
        "flopsPerSecond": rounded(rate),
        "limit": limit,
        **{name: rounded(value) for name, value in shares.items()},
    }


def peak_of(run: GenerateRun, found: Device) -> float | None:
    """Return what the administrator, or else the data sheet, says of the GPU's operations a second."""
    return (run.gpu and run.gpu.peak_flops) or found.peak_flops


def counted(engine: Engine, samples: Sequence[Sample], folder: Path, task: str) -> tuple[Made, int]:
    """Make the outputs, and return them with the floating-point operations that they take, padding included."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # torch 2.13 has no formula for the kernel that CPUs use.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        made = make_all(engine, samples, folder, task)
    return made, counter.get_total_flops()


def attention_operations(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the operations of attention, from the shapes of its inputs."""
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(query, key, value))


def make_all(engine: Engine, samples: Sequence[Sample], root: Path, task: str) -> Made:
    """Make the outputs as a shard of their own, and time it from the first one to the manifest."""
    from luthier_trainer.generation.ledger import Shard
    from luthier_trainer.generation.main import make
    from luthier_trainer.runtime.telemetry import Telemetry

    forget(engine)
    folder, span = WorkspaceFolder(root), range(len(samples))
    began = time.monotonic()
    shard = Shard(folder, 0, 1, engine.records, span, {"task": task}, "here")
    shard.resume()
    make(engine, shard, iter(samples), Telemetry(), None)
    shard.finish({"rows": len(span), "failedRows": shard.failed})
    seconds = time.monotonic() - began
    table = folder.result / engine.records.table(shard.result.name)
    return Made(seconds, [json.loads(line) for line in table.read_bytes().splitlines()])


def forget(engine: Engine) -> None:
    """Let an engine of images encode prompts again, which it keeps for further images of a prompt."""
    from luthier_trainer.generation.engines.images import ImageEngine

    if isinstance(engine, ImageEngine):
        engine.prompts.clear()


def product_rate(hardware: Hardware) -> float:
    """Return the operations a second of the fastest of some products of two matrices."""
    import torch

    side = MATRIX_SIDES[hardware.device]
    first, second = (torch.randn(side, side, device=hardware.device).to(hardware.dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(PRODUCTS):
        if hardware.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(first, second)
        if hardware.device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest
