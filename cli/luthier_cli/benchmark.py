"""`luthier bench`: the benchmarks of the trainer, in a process of its own. Their options are the trainer's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from luthier_api.kinds import JobKind
from luthier_cli.local import RUN_FILE, LocalJob
from luthier_cli.manifests import Refused

MODULE = "luthier_trainer.bench"
KINDS = {"train": JobKind.FINE_TUNE, "generate": JobKind.GENERATE}
"""Benchmark → the kind of job that it measures, of those that read manifests."""


def bench(which: str, words: Sequence[str], jobs: Sequence[LocalJob] = ()) -> int:
    """Run the benchmark `which` with the options `words`, and return its exit code.

    `jobs`: of a manifest, whose only job of the benchmark's kind is measured. Raises Refused.
    """
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        given = list(words)
        if jobs:
            if which not in KINDS:
                raise Refused([f"bench {which} reads no manifest; remove --file, or use {' or '.join(KINDS)}"])
            found = [job for job in jobs if job.kind is KINDS[which]]
            if len(found) != 1:
                raise Refused([f"bench {which} measures one {KINDS[which].value}, and the file has {len(found)}"])
            run_file = Path(folder) / RUN_FILE
            run_file.write_text(json.dumps(found[0].run_config(0).dump()))
            given += ["--run", str(run_file)]
        return subprocess.run([sys.executable, "-m", MODULE, which, *given], check=False).returncode
