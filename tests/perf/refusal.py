"""What a mistake in the run config costs: PID 1 from its start to its last word, beside what no Python program can
avoid and beside pydantic.

Taken in turns, so that a slow moment slows all three. Neighbour: `startup` measures a start that goes on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 25
BROKEN = {
    "kind": "FineTuneJob",
    "name": "job",
    "workspace": "/workspace/job",
    "spec": {"task": "causal-lm", "model": {"id": "org/model"}, "dataset": {"id": "org/rows", "splt": "train"}},
}
PYDANTIC = "import pydantic\nclass One(pydantic.BaseModel):\n    field: int"  # the import alone does nearly nothing


def measure(root: Path) -> dict[str, list[float]]:
    """Seconds of each start, round by round."""
    run = root / "run.json"
    run.write_text(json.dumps(BROKEN))
    starts = {
        "bare": (["-c", "pass"], 0),
        "pydantic": (["-c", PYDANTIC], 0),
        "refused": (["-m", "luthier_trainer", "train", "--run", str(run)], 64),
    }
    environment = os.environ | {"LUTHIER_RUN_DIR": str(root), "LUTHIER_TERMINATION_LOG": str(root / "termination.json")}
    found: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(ROUNDS):
        for name, (arguments, code) in starts.items():
            begin = time.monotonic()
            done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
            found[name].append(time.monotonic() - begin)
            if done.returncode != code:
                raise SystemExit(f"{name}: ended with {done.returncode}: {done.stderr}")
    return found


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {
        "rounds": ROUNDS,
        "fastest_s": {name: round(min(seconds), 3) for name, seconds in found.items()},
        "median_s": {name: round(seconds, 3) for name, seconds in middle.items()},
        "ratio_to_bare": round(middle["refused"] / middle["bare"], 1),
        "ratio_to_pydantic": round(middle["refused"] / middle["pydantic"], 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
