"""`python -m luthier_trainer.bench train`: one JSON document on stdout, everything else on stderr.

`luthier bench train` is the same command, which can also read a manifest; so is `generate` (`generating`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, read_run
from luthier_trainer.bench import generating, gpu
from luthier_trainer.bench.cases import MODELS, Case, make_model, run_of
from luthier_trainer.bench.comparison import device, surroundings, train
from luthier_trainer.bench.rounds import Course, Unmeasured

PEERS = ("plain", "trl")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="luthier bench train", description=__doc__)
    parser.add_argument("--run", type=Path, help="run config of a FineTuneJob, instead of the options of a case")
    parser.add_argument("--model-config", choices=sorted(MODELS), default=Case.model)
    parser.add_argument("--method", choices=("lora", "qlora", "full"), default=Case.method)
    parser.add_argument("--packing", choices=("none", "isolated", "concatenate"), default=Case.packing)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=Case.gpus)
    parser.add_argument("--batch-size", type=int, default=Case.batch_size)
    parser.add_argument("--micro-batch", type=int, default=Case.micro_batch)
    parser.add_argument("--max-length", type=int, default=Case.max_length)
    for field in fields(Course):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--peer", action="append", choices=PEERS, help="all when left out")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=1800, help="the most that the measurement may take")
    return parser.parse_args(words)


def case_of(given: argparse.Namespace) -> Case:
    return Case(
        model=given.model_config,
        **{field.name: getattr(given, field.name) for field in fields(Case) if field.name != "model"},
    )


def main(words: Sequence[str]) -> int:
    """Measure, print the document, and return the exit code."""
    given = arguments(words)
    course = Course(**{field.name: getattr(given, field.name) for field in fields(Course)})
    peers = [] if given.no_peers else given.peer or PEERS
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", ignore_cleanup_errors=True) as folder:
        root, document = Path(folder), dict[str, Any]()
        try:
            if given.run:
                run = read_run(given.run.read_bytes())
                assert isinstance(run, FineTuneRun), "the command has checked the kind"
                found = device(gpu=run.spec.resources.gpus_per_node > 0)
            else:
                case = case_of(given)
                document["case"] = case.document()
                make_model(case.model, root / "model", cpu=not case.gpus)
                found = device(gpu=case.gpus > 0)
                run = run_of(case, root / "measured", root / "model", course.steps, found.gpu)
            document |= surroundings(found) | train(run, root / "measured", course, peers, given.seconds, found)
        except Unmeasured as error:
            print(error, file=sys.stderr)
            return int(ExitCode.TRAINING_ERROR)
    print(json.dumps(document, indent=1))
    return 0


COMMANDS = {"train": main, "generate": generating.main, "gpu": gpu.main}

if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in COMMANDS:
        raise SystemExit(f"usage: python -m luthier_trainer.bench {{{','.join(COMMANDS)}}} [options]")
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
