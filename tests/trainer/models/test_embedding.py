"""Tokens that have no row in the model's embedding: refused where they can occur, given a row where that is asked
for.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer.conftest import MakeRun
from trainer.preparing import prepared
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from luthier_api.exitcodes import ExitCode
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

ROWS = 512
SPOKEN = "<image>"  # a special token


def with_tokens(folder: Path, into: Path, kind: str) -> Path:
    """The model with one more token, of a `kind`, than its embedding has rows."""
    shutil.copytree(folder, into)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if kind == "ordinary":
        tokenizer.add_tokens(["lutherie"])
    elif kind == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": [SPOKEN]})
    else:
        tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(into)
    return into


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    texts: list[str]
    fine_tune: str | None
    """What it says of a FineTuneJob; None where it is taken."""
    generate: str | None
    spec: dict[str, Any]


CASES = [
    Case(
        name="an ordinary token, in no text yet",
        kind="ordinary",
        texts=["The class"],
        fine_tune="lutherie (512)",
        generate="lutherie (512)",
        spec={},
    ),
    Case(
        name="padding",
        kind="padding",
        texts=["The class"],
        fine_tune="<padding> (512)",
        generate="<padding> (512)",
        spec={},
    ),
    Case(
        name="a special token that nothing uses, as Gemma 3 1B has",
        kind="special",
        texts=["The class"],
        fine_tune=None,
        generate=None,
        spec={},
    ),
    Case(
        name="a special token that the texts use",
        kind="special",
        texts=["The class", f"The {SPOKEN} class"],
        fine_tune="<image> (512)",
        generate="<image> (512)",
        spec={"parseSpecialTokens": True},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_a_token_without_a_row_is_refused_where_it_can_occur(
    case: Case, make_run: MakeRun, make_generate_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    model = {"path": str(with_tokens(tiny_model, tmp_path / "m", case.kind))}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in case.texts * 4))
    fine_tune = make_run(model=model, dataset={"files": [str(tmp_path / "rows.jsonl")]} | case.spec)
    generate = make_generate_run(model=model, inputs={"rows": [{"prompt": text} for text in case.texts]})
    for run, expected in ((fine_tune, case.fine_tune), (generate, case.generate)):
        notices.forget()
        if expected is None:
            main(run)
            assert [
                n
                for n in notices.given()
                if "have no row in the model's embedding (<image> (512)). None of the job's texts has one" in n
            ]
            continue
        with pytest.raises(Failure) as failure:
            main(run)
        assert failure.value.code is ExitCode.INVALID_SPEC
        assert (
            f"its tokenizer has 513 tokens, and 1 of those in use have no row in the model's embedding: {expected}. "
            in failure.value.message
        )
        assert "model.resizeEmbeddings: true" in failure.value.message


@pytest.mark.parametrize(
    ("task", "output"),
    [
        ("causal-lm", "own"),
        ("causal-lm", "tied"),
        ("causal-lm", "own, though config.json says that it is tied"),
        ("text-classification", "own"),
    ],
)
def test_rows_are_added_when_asked(
    task: str, output: str, make_run: MakeRun, tiny_model: Path, corpus_rows: Path, tmp_path: Path
) -> None:
    """What was there stays, to the bit; the new row is the same in each attempt; the tokenizer finds it."""
    path = with_tokens(tiny_model, tmp_path / "m", "ordinary")
    if output == "tied":
        weights_file = path / "model.safetensors"
        save_file(
            {name: w for name, w in load_file(weights_file).items() if name != "lm_head.weight"},
            weights_file,
            metadata={"format": "pt"},
        )
    if output != "own":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = []
    for name in ("one", "two"):
        notices.forget()
        run = make_run(
            name,
            task=task,
            model={"path": str(path), "resizeEmbeddings": True},
            method={"type": "full"},
            dataset={"files": [str(corpus_rows)]},
        )
        record, _ = prepared(run)
        assert any(
            "spec.model.resizeEmbeddings: 1 tokens had no row in the embedding (lutherie (512))" in n
            for n in notices.given()
        )
        auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
        model, loaded = auto.from_pretrained(record.model_path, output_loading_info=True)
        assert set(loaded["missing_keys"]) == (set() if task == "causal-lm" else {"score.weight"})
        weights.append(model.model.state_dict())
    before = AutoModelForCausalLM.from_pretrained(path)
    table = weights[0]["embed_tokens.weight"]
    assert table.shape[0] == model.config.vocab_size == ROWS + 1
    assert torch.equal(table[:ROWS], before.model.embed_tokens.weight)
    assert 0 < (table[ROWS] - table[:ROWS].mean(0)).abs().max() < 10 * table[:ROWS].std()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert record.new_tokens == [ROWS]
    if task == "causal-lm":
        head = model.lm_head.weight
        assert torch.equal(head[:ROWS], before.lm_head.weight)
        assert (head.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is (output == "tied")
    assert AutoTokenizer.from_pretrained(record.model_path)("lutherie")["input_ids"] == [ROWS]


def test_nothing_is_changed_where_each_token_has_a_row(make_run: MakeRun, tiny_model: Path) -> None:
    notices.forget()
    record, _ = prepared(make_run(model={"path": str(tiny_model), "resizeEmbeddings": True}, method={"type": "full"}))
    assert record.model_path == str(tiny_model)
    assert (
        "spec.model.resizeEmbeddings: each token of the tokenizer has a row in the embedding already, and nothing was"
        " changed" in notices.given()
    )
