"""`luthier inspect` shows a dataset as it would be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from luthier_cli.commands import app
from luthier_trainer.data.templates import TEMPLATES
from luthier_trainer.prepare import inspection

CHATS = [
    {"messages": [{"role": "user", "content": f"Word {i}?"}, {"role": "assistant", "content": " yes" * (i + 1)}]}
    for i in range(20)
]


def test_a_dataset_of_conversations(make_run: Any, tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    dataset = {"files": [str(path)], "chatTemplate": {"name": "zephyr"}, "evalFraction": 0.1}
    found = inspection.inspect(make_run(dataset=dataset), tmp_path / "work")

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [
        tokenizer.apply_chat_template(row["messages"], chat_template=TEMPLATES["zephyr"], return_dict=False)
        for row in CHATS
    ]
    assert found["splits"]["train"]["rows"] + found["splits"]["eval"]["rows"] == 20
    assert sum(split["tokens"] for split in found["splits"].values()) == sum(map(len, rows))
    assert found["report"]["splits"]["train"]["tokens"]["p100"] in [len(row) for row in rows]
    assert (found["form"], found["columns"]) == ("messages", {"messages": "lists"})
    assert "⟦ yes<|endoftext|>⟧" in found["firstRow"]


@pytest.mark.parametrize(
    ("lengths", "most", "expect"),
    [
        ([100] * 999 + [110], None, 128),  # the longest is hardly longer
        ([100] * 999 + [5000], None, 128),
        ([1000] * 1000, None, 1024),
        ([1000] * 1000, 512, 512),  # positions of the model
    ],
)
def test_the_recommended_length(lengths: list[int], most: int | None, expect: int) -> None:
    assert inspection.recommended(numpy.array(lengths), most) == expect


@pytest.mark.slow
def test_the_command(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.csv").write_text("instruction;input;output\nAdd;1 and 2;3\nSay hello;;Hello!\n")
    manifest = {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "adds"},
        "spec": {
            "task": "causal-lm",
            "model": {"path": str(tiny_model)},
            "dataset": {"files": ["rows.csv"], "csv": {"separator": "semicolon"}},
        },
    }
    (tmp_path / "job.yaml").write_text(json.dumps(manifest))
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "job.yaml")])
    assert done.exit_code == 0, done.output
    assert "train: 2 rows" in done.output
    assert "form: alpaca" in done.output
    assert "### Instruction:\nAdd\n\n1 and 2\n\n### Response:\n⟦3<|endoftext|>⟧" in done.output
    assert "recommended training.maxLength:" in done.output
    assert not (tmp_path / "adds").exists()
