"""Memory of an evaluation in which an encoder-decoder writes texts: planned on the meta device, against a real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import ResolvedSource
from luthier_trainer.methods.apply import with_method
from luthier_trainer.models import memory
from luthier_trainer.models.memory import Setting
from luthier_trainer.tasks.base import Model
from luthier_trainer.tasks.seq2seq import REFERENCE, TextScore
from luthier_trainer.tasks.table import task_of
from luthier_trainer.tasks.token_loss import TokenLoss
from luthier_trainer.workspace import gpu_memory
from trainer import measured_memory

ROWS, SOURCE, TEXT, WORDS = 6, 96, 40, 3000
UNDER, OVER = 0.02, 0.08
T5 = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "forced_eos_token_id": None,
}
LORA = {"type": "lora", "rank": 4}


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    beams: int
    config: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=lambda: {"type": "full"})


CASES = [
    Case(name="T5, greedily", kind="t5", beams=1, config=T5),
    Case(name="T5 with an adapter, four beams", kind="t5", beams=4, config=T5, method=LORA),
    Case(name="BART, three beams", kind="bart", beams=3, config=BART),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_evaluation_with_texts_holds_what_is_predicted(case: Case, tmp_path: Any) -> None:
    config = AutoConfig.for_model(case.kind, vocab_size=WORDS, **case.config)
    given = {
        "task": "seq2seq",
        "model": {"id": "org/model"},
        "dataset": {"id": "org/rows"},
        "method": case.method,
        "training": {"maxLength": SOURCE},
        "seq2seq": {"maxTargetLength": TEXT, "beams": case.beams},
        "resources": {"gpusPerNode": 0},
    }
    spec = FineTuneJobSpec.model_validate(given)
    trial = task_of(spec).trial(Model(ResolvedSource(source="m"), tmp_path, config, None), spec, None, None)
    assert isinstance(trial, memory.Trial)
    with torch.device("meta"):
        planned = with_method(trial.model, spec.method, "SEQ_2_SEQ_LM", [], deepspeed=False)
    setting = Setting("cpu", None, padded=True)
    lines = memory.moments_beside(planned, trial, setting)["evaluating"]

    base = AutoModelForSeq2SeqLM.from_config(config)
    TokenLoss(base, chunked=True, shifted=False)
    model = with_method(base, spec.method, "SEQ_2_SEQ_LM", [], deepspeed=False)
    model.eval().generation_config.eos_token_id = None  # each text is as long as the longest
    tokenizer: Any = SimpleNamespace(batch_decode=lambda ids, **_: ["text"] * len(ids))
    trainer: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), model=model)
    score = TextScore(tokenizer, case.beams, TEXT)

    @torch.no_grad()
    def evaluate() -> None:
        ids, labels = torch.randint(3, WORDS, (ROWS, SOURCE)), torch.randint(3, WORDS, (ROWS, TEXT))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": labels.clone()}
        outputs = model(**batch, labels=labels, use_cache=False)  # as the trainer has it
        score.rows(outputs, batch | {"labels": labels, REFERENCE: ["text"] * ROWS}, trainer)

    peak = measured_memory.peak_of(evaluate)
    assert -UNDER <= gpu_memory.line(lines, ROWS) / peak - 1 <= OVER, (gpu_memory.line(lines, ROWS), peak)
