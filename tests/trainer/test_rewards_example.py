"""`luthier run` with the real trainer: the three manifests of examples/rewards, made short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainer.one_process import luthier_run
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/rewards"
SHORT: dict[str, dict[str, Any]] = {
    "1-answers.yaml": {"maxSteps": 12, "warmupSteps": 2, "logSteps": 4},
    "2-judge.yaml": {"maxSteps": 8, "logSteps": 4},
    "3-improved.yaml": {"maxSteps": 2, "logSteps": 1},
}


def test_from_answers_over_a_judge_to_better_answers(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(EXAMPLE / "data.py"), str(tmp_path / "data")], check=True)
    for name, changes in SHORT.items():
        document = yaml.safe_load((EXAMPLE / name).read_text())
        document["spec"]["training"] |= changes
        (tmp_path / name).write_text(yaml.safe_dump(document))
    answers, judge, improved = luthier_run(tmp_path, *SHORT)
    assert answers["metrics"]["lastLoss"] < 6
    assert judge["metrics"]["evalLoss"] < judge["metrics"]["evalLossBefore"]
    assert AutoModelForSequenceClassification.from_pretrained(judge["result"]).config.num_labels == 1
    found = improved["metrics"]
    assert found["reward"] == pytest.approx(found["reward.exactMatch"] + 0.1 * found["reward.model"])
    assert {"kl", "trainReward", "completionLength", "clippedShare"} <= found.keys()
    assert (Path(improved["result"]) / "adapter_model.safetensors").exists()
