"""Language models in less memory: quantised while they are loaded, or with layers that wait in the node's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.generating import generate_run, generate_shards, result_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from luthier_api.generate import GenerateJobSpec
from luthier_trainer.generation.engines.text import TextEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.offloading import offload_layers
from luthier_trainer.prepare import main as prepare
from luthier_trainer.prepare.generation import check_memory_settings
from luthier_trainer.runtime.failure import Failure

PROMPTS = ["The class of a", "An object", "A function is called with several arguments", "The list"]
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths are multiples of 64, as bitsandbytes' kernels on CPU want it."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=512, max_position_embeddings=128, initializer_range=0.2, eos_token_id=tokenizer.eos_token_id, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def engine(folder: Path, precision: str = "fp32", batch_size: int = 2, **spec: Any) -> TextEngine:
    given = {"task": "text-generation", "inputs": {"rows": [{"prompt": "a"}]}, "resources": {"gpus": 0}}
    whole = GenerateJobSpec.model_validate(given | {"model": {"path": str(folder)}} | spec)
    return TextEngine(whole, folder, folder, [], Hardware("cpu", precision), batch_size)


CONFIGS: list[tuple[str, str, dict[str, Any]]] = [
    ("nf4", "fp32", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    ("fp4", "bf16", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    ("int8", "bf16", {"load_in_8bit": True}),
]


@pytest.mark.parametrize(("kind", "precision", "config"), CONFIGS)
@torch.inference_mode()
def test_logits_are_those_of_transformers(kind: str, precision: str, config: dict[str, Any], wide: Path) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    compute = {"bnb_4bit_compute_dtype": dtype} if kind != "int8" else {}
    theirs = AutoModelForCausalLM.from_pretrained(
        wide, dtype=dtype, quantization_config=BitsAndBytesConfig(**config, **compute), device_map={"": "cpu"}
    )
    ours = engine(wide, precision, model={"path": str(wide), "quantization": {"type": kind}}).model
    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=dtype)
    expected = theirs(input_ids=IDS).logits
    assert torch.equal(ours(input_ids=IDS).logits, expected)
    assert not torch.equal(plain(input_ids=IDS).logits, expected)


Texts = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def texts(tmp_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch) -> Texts:
    """The lines of a job over the wide model in some quantisation."""

    def make(kind: str, prompts: list[str], **spec: Any) -> list[dict[str, Any]]:
        run = generate_run(
            tmp_path / f"job{len(list(tmp_path.glob('job*')))}",
            [{"prompt": prompt, "id": prompt} for prompt in prompts],
            task="text-generation",
            model={"path": str(wide), "quantization": {"type": kind}},
            text={"maxNewTokens": 12},
            batchSize=2,
            **spec,
        )
        generate_shards(run, monkeypatch, prepare.main)
        return result_lines(run)

    return make


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_text_does_not_depend_on_the_others(kind: str, texts: Texts, capsys: pytest.CaptureFixture[str]) -> None:
    one = {line["id"]: line["text"] for line in texts(kind, PROMPTS)}
    assert len(set(one.values())) == len(PROMPTS)
    said = capsys.readouterr().out
    other = {line["id"]: line["text"] for line in texts(kind, PROMPTS[::-1], shards=2)}
    assert other == one
    assert ("LLM.int8()" in said) == (kind == "int8")


def test_outputs_of_another_quantisation_have_other_settings(texts: Texts) -> None:
    """`run` is the digest of the settings."""
    assert texts("nf4", PROMPTS[:1])[0]["run"] != texts("fp4", PROMPTS[:1])[0]["run"]


STORED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
REFUSED: list[tuple[int, dict[str, Any], dict[str, Any], str]] = [
    (96, {}, {"type": "nf4"}, "spec.model.quantization: nf4 on CPU needs widths of a multiple of 64"),
    (64, STORED, {"type": "nf4"}, "spec.model.quantization: the weights are quantised already (bitsandbytes)"),
    (64, STORED, {}, "spec.text.offload: packed weights of bitsandbytes stay on the GPU"),
]
"""Width of the model, how it is stored, `model.quantization`, and the message. Without quantisation layers wait."""


@pytest.mark.parametrize(("width", "stored", "asked", "problem"), REFUSED)
def test_what_prepare_refuses(width: int, stored: dict[str, Any], asked: dict[str, Any], problem: str) -> None:
    config = LlamaConfig(hidden_size=width, **({"quantization_config": stored} if stored else {}))
    quantised = {"quantization": asked} if asked else {}
    run = generate_run(
        Path("/w"),
        [{"prompt": "a"}],
        task="text-generation",
        model={"path": "/m"} | quantised,
        text={} if asked else {"offload": "layers"},
    )
    with pytest.raises(Failure) as failed:
        check_memory_settings(config, run.spec)
    assert failed.value.message.startswith(problem)


@torch.inference_mode()
def test_layers_that_wait_elsewhere_compute_the_same(wide: Path) -> None:
    plain, other = (AutoModelForCausalLM.from_pretrained(wide).eval() for _ in range(2))
    offloaded = offload_layers(other, torch.device("cpu"))
    layers = {name for name, weight in offloaded.named_parameters() if weight.is_meta}
    assert layers == {name for name, _ in plain.named_parameters() if name.startswith("model.layers.")}
    assert torch.equal(offloaded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert all(offloaded.get_parameter(name).is_meta for name in layers), "they go when they have computed"


def test_texts_of_layers_that_wait_elsewhere_are_the_same(wide: Path) -> None:
    from trainer.generating import sample

    def made(**text: Any) -> list[str | None]:
        made = engine(wide, text={"maxNewTokens": 12} | text)
        assert any(weight.is_meta for weight in made.model.parameters()) == ("offload" in text)
        samples = [sample(prompt, row=i, settings=made.settings) for i, prompt in enumerate(PROMPTS)]
        outputs = [output for some in made.work(samples) for output in some]
        return [output.text for output in sorted(outputs, key=lambda output: output.sample.row)]

    assert made(offload="layers") == made()
