"""`luthier run` with the real trainer: the quickstart's three manifests, made short; stopped once on the way, and gone
on with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).resolve().parents[2] / "examples/quickstart"
ROWS = 150
SHORT: dict[str, dict[str, Any]] = {
    "1-base.yaml": {
        "training": {"maxSteps": 24, "saveSteps": 4, "batchSize": 4, "maxLength": 32, "warmupSteps": 2, "logSteps": 2},
        "resources": {"processesPerNode": 1},
    },
    "2-adapter.yaml": {
        "training": {"maxSteps": 6, "batchSize": 4, "maxLength": 32, "logSteps": 2},
        "resources": {"processesPerNode": 1},
    },
    "3-generate.yaml": {"text": {"maxNewTokens": 8}},
}


def test_quickstart(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(QUICKSTART / "data.py"), str(tmp_path / "data")], check=True)
    for file in (tmp_path / "data").glob("*.jsonl"):
        file.write_text("".join(f"{line}\n" for line in file.read_text().split("\n")[:ROWS]))
    for name, changes in SHORT.items():
        document = yaml.safe_load((QUICKSTART / name).read_text())
        for field, values in changes.items():
            document["spec"][field] |= values
        (tmp_path / name).write_text(yaml.safe_dump(document))
    words = [sys.executable, "-m", "luthier_cli", "run", *SHORT, "--mount", "/data=data", "-o", "json"]

    first = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 180
    while first.poll() is None and not list(tmp_path.glob("luthier-runs/base/checkpoints/checkpoint-*")):
        assert time.monotonic() < until
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=120)
    stopped = json.loads(out)
    assert first.returncode == stopped["code"] == 75, err
    assert [job["state"] for job in stopped["jobs"]] == ["Stopped", "NotRun", "NotRun"]

    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    base, adapter, texts = json.loads(done.stdout)["jobs"]
    assert "prepare" in base["seconds"], base["seconds"]
    for job in (base, adapter):
        assert job["metrics"]["evalLoss"] < job["metrics"]["evalLossBefore"]
    assert (tmp_path / "luthier-runs/base/result/model.safetensors").exists()
    assert (tmp_path / "luthier-runs/sessions/result/adapter_model.safetensors").exists()
    assert texts["metrics"].keys() == {"rows", "failedRows", "seconds", "rowsPerSecond"}
    lines = [
        json.loads(line)
        for path in Path(texts["result"]).glob("shard-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert all(line["text"] for line in lines)
    log = (tmp_path / "luthier-runs/base/logs/run-0.log").read_text()
    assert "Traceback" not in log
