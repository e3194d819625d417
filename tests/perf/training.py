"""Our trainer against plain scripts of transformers and TRL: `luthier bench train`, without and with packing.

The programs take turns on one core, ten steps at a time, in the order A B B A; what counts is the median of the ratios
of CPU seconds. LoRA of a Llama of 2.6 million weights with the same rows, batches and arguments.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

LIMIT = 0.97  # of plain Trainer, without packing; of TRL with packing it is 1
CASES = {
    "not packed, beside plain Trainer": ["--peer", "plain"],
    "packed, beside TRL": ["--peer", "trl", "--packing", "isolated", "--max-length", "512"],
}


def measure(options: list[str]) -> dict[str, Any]:
    """Raises subprocess.CalledProcessError if nothing was measured; the reason is on stderr."""
    command = [sys.executable, "-m", "luthier_trainer.bench", "train", *options]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def main() -> dict[str, Any]:
    """The documents of both cases, and the ratios that matter."""
    found = {name: measure(options) for name, options in CASES.items()}
    ratios = {
        name: peer["ours"]["cpuSecondsRatio"] for name, document in found.items() for peer in document["peers"].values()
    }
    return {"cpu_seconds_ratios": ratios, "limit": LIMIT, "measured": found}
