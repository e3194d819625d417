"""What models of transformers need of a GPU, against what they hold on a CPU, and what is refused: it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.generating import generate_run
from trainer.tones import speech_tokenizer
from trainer.word_pieces import word_pieces
from transformers import (
    BertConfig,
    BitsAndBytesConfig,
    BlipConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    T5Config,
    VisionEncoderDecoderConfig,
    ViTConfig,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

from luthier_api.exitcodes import ExitCode
from luthier_api.run import Gpu
from luthier_api.status import Memory, Plan
from luthier_trainer.generation import rows
from luthier_trainer.generation.answer_memory import Text, Work, held_by, held_in_slots, memory_of
from luthier_trainer.generation.slots import Slots
from luthier_trainer.models import inspect
from luthier_trainer.models.inspect import auto_class
from luthier_trainer.prepare.answer_plan import fitted
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
WIDE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}


def work(**change: Any) -> Work:
    return Work(**{"rows": 4, "read": (200,), "written": MADE, "beams": 1, "draws": False} | change)


def test_what_is_held_is_what_a_cpu_holds() -> None:
    """The same texts in the slots of a model with weights."""
    model = LlamaForCausalLM(LLAMA).eval()
    texts, (read,) = work().rows, work().read

    def write() -> None:
        def choose(held: Any, logits: torch.Tensor) -> None:
            logits.float().argmax(-1)
            for text in held:
                if text is not None:
                    text.new.append(0)

        slots = Slots(model, texts, 0, prefill_tokens=1024)
        for _ in slots.write([Text([1] * read) for _ in range(2 * texts)], 256, choose):
            pass

    planned = held_in_slots(inspect.skeleton(LLAMA, "text-generation", "spec.model"), work())
    keys = 3 * 2 * texts * 256 * 128 * 4  # layers, keys and values, slots, capacity, width, fp32
    # What the last reading has made of as many prompts is kept until the next one.
    assert planned.cache == pytest.approx(2 * keys, rel=0.02)
    assert planned.most == pytest.approx(measured_memory.peak_of(write), rel=0.1)


VIT = ViTConfig(image_size=64, patch_size=8, **WIDE)
CAPTIONS = VisionEncoderDecoderConfig(
    encoder=VIT.to_dict(),
    decoder=BertConfig(**WIDE, vocab_size=400, is_decoder=True, add_cross_attention=True).to_dict(),
    decoder_start_token_id=1,
    pad_token_id=0,
)
WHISPER = WhisperConfig(
    vocab_size=400,
    d_model=128,
    encoder_layers=3,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=256,
    decoder_ffn_dim=256,
    num_mel_bins=16,
    max_source_positions=100,
    max_target_positions=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
SEEN, HEARD = (3, 64, 64), (16, 200)


@pytest.mark.parametrize(
    ("task", "config", "work"),
    [
        ("image-classification", VIT, work(read=SEEN, written=0)),
        ("image-to-text", CAPTIONS, work(read=SEEN, written=40)),
        ("image-to-text", CAPTIONS, work(rows=1, read=SEEN, written=40, beams=3)),
        ("automatic-speech-recognition", WHISPER, work(read=HEARD, written=40)),
        ("automatic-speech-recognition", WHISPER, work(read=HEARD, written=40, beams=3)),
    ],
)
def test_images_and_audio_hold_what_a_cpu_holds(task: str, config: Any, work: Work) -> None:
    """Against transformers' own `generate`, of a model with weights."""
    torch.manual_seed(1)
    model = auto_class(task).from_config(config).eval()
    inputs = {model.main_input_name: torch.randn(work.rows, *work.read)}
    lengths = {"max_new_tokens": work.written or None, "min_new_tokens": work.written or None}
    settings = GenerationConfig(**lengths, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)

    @torch.no_grad()
    def answer() -> None:
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        # The engine asks Whisper for segments.
        asked = {"return_segments": True} if task == "automatic-speech-recognition" else {}
        if work.written:
            model.generate(**given, generation_config=settings, num_beams=work.beams, **asked)
        else:
            model(**given)

    planned = held_by(inspect.skeleton(config, task, "spec.model").eval(), task, work)
    assert planned.most == pytest.approx(measured_memory.peak_of(answer), rel=0.1)


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


TOO_MUCH = "spec.resources.gpuMemory: a batch of 4 texts with "
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
        "labels of images",
        lambda needs: needs.gpu_bytes - 1,
        "spec.resources.gpuMemory: a batch of 4 images with 3 x 64 x 64 values each needs ",
        spec={"task": "image-classification"},
        config=VIT,
        said=("batchSize: 2 (", "model.quantization: {type: int8} ("),
    ),
    Case(
        "texts of images",
        lambda needs: needs.gpu_bytes - 1,
        "spec.resources.gpuMemory: a batch of 4 images with 3 x 64 x 64 values and 256 tokens each needs ",
        spec={"task": "image-to-text"},
        config=CAPTIONS,
        said=("batchSize: 2 (",),
    ),
    Case(
        "texts of audio",
        lambda needs: needs.gpu_bytes - 1,
        "spec.resources.gpuMemory: a batch of 4 audio files with 16 x 200 values and 48 tokens each needs ",
        spec={"task": "automatic-speech-recognition"},
        config=WHISPER,
        said=("batchSize: 2 (",),
    ),
    Case(
        "what cannot be computed is said",
        lambda needs: 1,
        config=MambaConfig(vocab_size=400, hidden_size=64, num_hidden_layers=2),
        said=("spec.model: what its texts need of the GPU is not known (",),
    ),
    Case(
        "how some write of images is not computed, which is said",
        lambda needs: 1,
        spec={"task": "image-to-text"},
        config=BlipConfig(),
        said=("spec.model: what its images need of the GPU is not known (ValueError: blip is not of an encoder",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_that_does_not_fit_is_refused_with_what_would(
    case: Case, tmp_path: Path, paragraphs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    (case.config or LLAMA).save_pretrained(model)
    prepared = tmp_path / "prepared"
    word_pieces(paragraphs[:100], 512).save_pretrained(prepared / "tokenizer")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(prepared / "processor")
    given = {"task": "text-generation", "batchSize": 4, "resources": {"gpus": 1}} | case.spec
    if given["task"] == "automatic-speech-recognition":
        extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
        WhisperProcessor(extractor, speech_tokenizer()).save_pretrained(prepared / "processor")
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
        said = capsys.readouterr().out
        assert [part for part in case.said if part not in said] == [], said
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
