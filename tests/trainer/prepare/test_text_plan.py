"""What texts need of a GPU, against what they really hold on a CPU, and what is refused because it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.generating import generate_run
from trainer.word_pieces import word_pieces
from transformers import BertConfig, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, MambaConfig, T5Config

from luthier_api.exitcodes import ExitCode
from luthier_api.run import Gpu
from luthier_api.status import Memory, Plan
from luthier_trainer.generation import rows
from luthier_trainer.generation.slots import Slots
from luthier_trainer.generation.text_memory import Text, Work, held_in_slots, memory_of
from luthier_trainer.models import inspect
from luthier_trainer.prepare.text_plan import fitted
from luthier_trainer.runtime.failure import Failure
from trainer import measured_memory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PLAN = Plan(strategy="none", precision="bf16", rows_per_shard=100)
LLAMA = LlamaConfig(
    vocab_size=400,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=512,
)
SMALL = {"vocab_size": 400, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
MADE = 8


def work(**change: Any) -> Work:
    return Work(**{"texts": 4, "read": 200, "written": MADE, "beams": 1, "draws": False} | change)


def test_what_is_held_is_what_a_cpu_holds() -> None:
    """The same texts in the slots of a model with weights."""
    model = LlamaForCausalLM(LLAMA).eval()
    texts = work().texts

    def write() -> None:
        def choose(held: Any, logits: torch.Tensor) -> None:
            logits.float().argmax(-1)
            for text in held:
                if text is not None:
                    text.new.append(0)

        slots = Slots(model, texts, 0, prefill_tokens=1024)
        for _ in slots.write([Text([1] * work().read) for _ in range(2 * texts)], 256, choose):
            pass

    planned = held_in_slots(inspect.skeleton(LLAMA, "text-generation", "spec.model"), work())
    keys = 3 * 2 * texts * 256 * 128 * 4  # layers, keys and values, slots, capacity, width, fp32
    # What the last reading has made of as many prompts is kept until the next one.
    assert planned.cache == pytest.approx(2 * keys, rel=0.02)
    assert planned.most == pytest.approx(measured_memory.peak_of(write), rel=0.1)


@pytest.mark.parametrize(
    ("kind", "bits"), [(None, {}), ("nf4", {"load_in_4bit": True}), ("int8", {"load_in_8bit": True})]
)
def test_weights_that_are_there(kind: Any, bits: dict[str, Any], tmp_path: Path) -> None:
    """As transformers counts those of a model that it has loaded; with layers that wait, one of them is there."""
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    given: dict[str, Any] = {}
    if bits:
        quantised = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        given = {"quantization_config": quantised, "device_map": {"": "cpu"}}
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **given)
    every = memory_of(LLAMA, "text-generation", work(), torch.bfloat16, kind, offload=False)
    # transformers counts the scales of 4 bits nowhere.
    assert every.gpu["weights"] == pytest.approx(model.get_memory_footprint(), rel=0.05)
    if not bits:
        layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
        waiting = memory_of(LLAMA, "text-generation", work(), torch.bfloat16, None, offload=True)
        assert every.gpu["weights"] - waiting.gpu["weights"] == 2 * layer
        assert waiting.host_bytes == every.host_bytes


@dataclass(frozen=True)
class Case:
    name: str
    limit: Callable[[Memory], int]
    """What is needed → the memory of the GPU."""
    expect: str = ""
    """How the refusal begins that names field and figure; none: it fits."""
    spec: dict[str, Any] = field(default_factory=dict)
    config: Any = None
    """Of the model; None: that of a Llama."""
    said: tuple[str, ...] = ()
    """What the refusal or a notice says."""


TOO_MUCH = "spec.resources.gpuMemory: a batch of 4 with "
CASES = [
    Case("it fits", lambda needs: needs.gpu_bytes),
    Case(
        "one byte is missing",
        lambda needs: needs.gpu_bytes - 1,
        TOO_MUCH,
        said=("batchSize: 2 (", "text.offload: layers (", "model.quantization: {type: int8} ("),
    ),
    Case("nothing helps", lambda needs: 1, TOO_MUCH, said=("Use a larger GPU, or a smaller model",)),
    Case(
        "other texts",
        lambda needs: needs.gpu_bytes - 1,
        TOO_MUCH,
        spec={"task": "summarization"},
        config=T5Config(vocab_size=400, d_model=64, d_ff=256, num_layers=2, num_heads=2),
        said=("batchSize: 2 (", "model.quantization: {type: int8} ("),
    ),
    Case(
        "labels of texts",
        lambda needs: needs.gpu_bytes - 1,
        TOO_MUCH,
        spec={"task": "text-classification"},
        config=BertConfig(**SMALL, intermediate_size=256),
        said=("batchSize: 2 (",),
    ),
    Case(
        "what cannot be computed is said",
        lambda needs: 1,
        config=MambaConfig(vocab_size=400, hidden_size=64, num_hidden_layers=2),
        said=("spec.model: what its texts need of the GPU is not known (",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_that_does_not_fit_is_refused_with_what_would(
    case: Case, tmp_path: Path, paragraphs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    (case.config or LLAMA).save_pretrained(model)
    word_pieces(paragraphs[:100], 512).save_pretrained(tmp_path / "prepared" / "tokenizer")
    given = {"task": "text-generation", "batchSize": 4, "resources": {"gpus": 1}} | case.spec
    role = "prompt" if given["task"] == "text-generation" else "text"
    texts = [{role: text} for text in paragraphs[30:40]]
    run = generate_run(tmp_path, texts, model={"path": str(model)}, **given)
    file = run_rows(run, texts)

    def fit(limit: int | None) -> Plan:
        return fitted(run.model_copy(update={"gpu": Gpu(memory=limit)}), PLAN, model, file)

    free = fit(None).memory
    limit = case.limit(free or Memory())
    if not case.expect:
        assert fit(limit).memory == free
        assert all(part in capsys.readouterr().out for part in case.said)
        return
    with pytest.raises(Failure) as failed:
        fit(limit)
    assert failed.value.code == ExitCode.DOES_NOT_FIT
    assert failed.value.message.startswith(case.expect)
    assert all(part in failed.value.message for part in case.said), failed.value.message


def run_rows(run: Any, texts: list[dict[str, Any]]) -> Path:
    from luthier_api.workspace import WorkspaceFolder

    file = WorkspaceFolder(Path(run.workspace)).prepared / "rows.jsonl"
    rows.write(file, [{"row": i, **text} for i, text in enumerate(texts)], 1)
    return file
