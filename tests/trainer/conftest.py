"""Real text, and models small enough for one core: shared by all tests of the trainer.

The text is the language reference that every Python carries (`pydoc_data.topics`), so that losses fall for a reason.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import pytest
from hub.server import Running

from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.spec import NewModel
from luthier_api.variables import Variables
from luthier_trainer.data import full_lengths
from luthier_trainer.models.new_model import new_config, save_new_model
from luthier_trainer.models.new_tokenizer import train_tokenizer
from luthier_trainer.runtime import notices

if TYPE_CHECKING:
    from datasets import DatasetDict

# Before torch is imported, which reads it once: two workers with two threads each on two cores spend most of their time
# waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# accelerate reads what is installed each time that it unwraps a model: a twentieth of a small training.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network unless a test asks for it, a run folder and caches of the test's own."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        Variables.RUN_DIR: str(run_dir),
        Variables.TERMINATION_LOG: str(run_dir / "termination-log"),
    }.items():
        monkeypatch.setenv(name, value)
    notices.forget()
    for use in ("training", "held-out"):
        full_lengths.take(use)


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """About 3,000 paragraphs of Python's language reference."""
    blocks = "\n\n".join(text for _, text in sorted(topics.items())).split("\n\n")
    return [b.strip() for b in blocks if len(b.strip()) > 40]


@pytest.fixture(scope="session")
def corpus_file(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 100 kB."""
    path = tmp_path_factory.mktemp("corpus") / "reference.txt"
    path.write_text("\n\n".join(paragraphs[:250]) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus_rows(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows {"text", "label"} as JSON lines: is the paragraph about classes or not?"""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"text": p, "label": "class" if "class" in p else "other"} for p in paragraphs[:200]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pairs(paragraphs: list[str]) -> list[dict[str, str]]:
    """24 pairs: how a paragraph goes on, or its words backwards."""
    found = []
    for text in [p for p in paragraphs if len(p.split()) > 20][:24]:
        words = text.split()
        answer = words[5:15]
        found.append(
            {"prompt": " ".join(words[:5]), "chosen": " " + " ".join(answer), "rejected": " " + " ".join(answer[::-1])}
        )
    return found


@pytest.fixture(scope="session")
def tiny_model(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with new weights and a tokenizer of its own (512 entries), in one folder. Read-only: copy it
    to change it.
    """
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = train_tokenizer(paragraphs[:250], 512)
    tokenizer.save_pretrained(folder)
    save_new_model(new_config(NewModel(model_type="llama", vocab_size=512, parameters=TINY), tokenizer), folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def llama(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with new weights and a tokenizer of its own, wide enough for weights in 4 bits. Read-only."""
    from prepared_workspace import save_llama  # brings what most tests do without

    return save_llama(tmp_path_factory.mktemp("llama"), paragraphs)


@pytest.fixture(scope="session")
def prose_data(llama: Path, paragraphs: list[str]) -> DatasetDict:
    """Paragraphs of prose as rows of token ids of `llama`, in the splits `train` and `eval`."""
    from prepared_workspace import causal_lm_data, prose
    from transformers import AutoTokenizer

    return causal_lm_data(AutoTokenizer.from_pretrained(llama), prose(paragraphs))


@pytest.fixture(scope="session")
def deepspeed_operators() -> None:
    """DeepSpeed compiles its collectives for CPU: half a minute once, then they are found in TORCH_EXTENSIONS_DIR."""
    from trainer.distributed.groups import compile_operator  # brings what most tests do without

    compile_operator("ShareMemComm")


@pytest.fixture(scope="session")
def deepspeed_optimizer(deepspeed_operators: None) -> None:
    """Its AdamW for CPU takes a minute of two cores."""
    from trainer.distributed.groups import compile_operator

    compile_operator("CPUAdam")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A Hub of our own, and no token; the Hub's clients of this process and of its children speak to it."""
    with Running(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # read when it was imported
        # That of whoever runs the tests
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("LUTHIER_HUB_DEADLINE", "5")
        monkeypatch.delenv(Variables.TOKEN, raising=False)
        yield server


MakeRun = Callable[..., FineTuneRun]


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, corpus_rows: Path) -> MakeRun:
    """A FineTuneRun on CPU over the tiny model and corpus; keywords replace fields of its spec (as users write
    them).
    """

    def make(
        name: str = "job", sources: dict[str, str] | None = None, grace_seconds: int = 60, **spec: Any
    ) -> FineTuneRun:
        given: dict[str, Any] = {
            "task": "causal-lm",
            "model": {"path": str(tiny_model)},
            "dataset": {"files": [str(corpus_rows)]},
            "training": {"maxLength": 64, "batchSize": 4},
            "resources": {"gpusPerNode": 0},
        }
        return FineTuneRun.model_validate(
            {
                "name": name,
                "workspace": str(tmp_path / "workspace" / name),
                "sources": sources or {},
                "metricsPort": 0,
                "graceSeconds": grace_seconds,
                "spec": given | spec,
            }
        )

    return make


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of each digit, in a folder of its name. Read-only: copy it to change it."""
    from trainer.digits import write_digits  # brings what most tests do without

    return write_digits(tmp_path_factory.mktemp("images") / "digits")


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer with new weights and its image processor. Read-only."""
    from trainer.digits import save_model

    return save_model(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Stable Diffusion XL with new weights, 4 MB, as a repository on the Hub would hold it. Read-only."""
    from trainer.small_sdxl import write_small_sdxl

    return write_small_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Stable Diffusion 1.5."""
    from trainer.small_sdxl import write_small_sd

    return write_small_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def classify(make_run: MakeRun, digits: Path, vit: Path) -> MakeRun:
    """A run over the digits; fields of `dataset` and `training` are merged with what is there."""

    def make(name: str = "job", sources: dict[str, str] | None = None, **spec: Any) -> FineTuneRun:
        data = {"files": [str(digits)], "format": "imagefolder", "evalFraction": 0.2} | spec.pop("dataset", {})
        training = {"batchSize": 32, "maxSteps": 100, "learningRate": 3e-3, "logSteps": 50} | spec.pop("training", {})
        given = {"task": "image-classification", "model": {"path": str(vit)}, "method": {"type": "full"}} | spec
        return make_run(
            name, sources, **given, dataset={k: v for k, v in data.items() if v is not None}, training=training
        )

    return make


@pytest.fixture
def make_generate_run(tmp_path: Path, tiny_model: Path) -> Callable[..., GenerateRun]:
    """A GenerateRun on CPU over the tiny model; keywords replace fields of its spec."""

    def make(
        name: str = "gen", sources: dict[str, str] | None = None, grace_seconds: int = 60, **spec: Any
    ) -> GenerateRun:
        given: dict[str, Any] = {
            "task": "text-generation",
            "model": {"path": str(tiny_model)},
            "inputs": {"rows": [{"prompt": "The class"}]},
            "text": {"maxNewTokens": 8},
            "resources": {"gpus": 0},
        }
        return GenerateRun.model_validate(
            {
                "name": name,
                "workspace": str(tmp_path / "workspace" / name),
                "sources": sources or {},
                "metricsPort": 0,
                "graceSeconds": grace_seconds,
                "spec": given | spec,
            }
        )

    return make
