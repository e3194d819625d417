"""What `luthier bench generate` counts and computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.generating import generate_run, prepare_by_hand
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier_api.kinds import JobKind
from luthier_api.run import Gpu
from luthier_cli import benchmark
from luthier_cli.manifests import Refused
from luthier_trainer.bench import generating
from luthier_trainer.bench.comparison import Device
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.workspace.prepared import read_prepared

PROMPTS = ("The class", "An import statement is", "Some")
NEW = 5
LIMIT = 1e9


@pytest.fixture
def measured(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures of three texts of five tokens, one after the other, on a device whose limit is known."""
    monkeypatch.setattr(generating, "product_rate", lambda hardware: LIMIT)
    text = {"maxNewTokens": NEW, "minNewTokens": NEW}
    rows = [{"prompt": prompt} for prompt in (*PROMPTS, "This one is not asked for")]
    model = {"path": str(tiny_model)}
    run = generate_run(tmp_path / "job", rows, task="text-generation", model=model, text=text, batchSize=1)
    prepare_by_hand(run)
    return generating.measure(run, read_prepared(run), tmp_path / "made", len(PROMPTS), 2, Device())


def test_operations_are_those_of_the_model(measured: dict[str, Any], tiny_model: Path) -> None:
    """Those of its weights and of attention, as its shapes say. A prompt is read but for its last token, which the
    first of the steps reads.
    """
    config = AutoConfig.from_pretrained(tiny_model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    layers = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    head, width = model.lm_head.weight.numel(), config.num_attention_heads * config.head_dim
    expected = 0
    for prompt in PROMPTS:
        read = len(tokenizer(prompt)["input_ids"]) - 1
        pairs = read * read + sum(read + step for step in range(1, NEW + 1))
        forwards = (read > 0) + NEW
        expected += 2 * ((read + NEW) * layers + forwards * head)
        expected += 4 * config.num_hidden_layers * width * pairs
    assert measured["flopsPerOutput"] == pytest.approx(expected / len(PROMPTS), rel=1e-4)


def test_figures_follow_from_seconds_and_operations(measured: dict[str, Any]) -> None:
    seconds = sum(measured["secondsOfRounds"]) / 2  # the median of two
    assert (measured["outputs"], measured["failed"], measured["rounds"]) == (3, 0, 2)
    assert measured["outputsPerSecond"] == pytest.approx(3 / seconds, rel=1e-3)
    assert measured["tokensPerSecond"] == pytest.approx(3 * NEW / seconds, rel=1e-3)
    assert measured["flopsPerSecond"] == pytest.approx(3 * measured["flopsPerOutput"] / seconds, rel=1e-3)
    assert measured["shareOfLimit"] == pytest.approx(measured["flopsPerSecond"] / LIMIT, rel=1e-3)
    assert "imagesPerSecond" not in measured
    assert measured["limit"]["flopsPerSecond"] == LIMIT


def test_images_are_counted(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt twice: its embedding is computed in each round, and each image takes as much as the other."""
    monkeypatch.setattr(generating, "product_rate", lambda hardware: LIMIT)
    image = {"steps": 1, "width": 32, "height": 32, "guidance": 1.0}
    rows = [{"prompt": "a lute"}, {"prompt": "a harp"}]
    given = {"task": "text-to-image", "model": {"path": str(sdxl)}, "image": image, "batchSize": 1}
    figures = {}
    for count in (1, 2):
        run = generate_run(tmp_path / f"job-{count}", rows, **given)
        prepare_by_hand(run)
        figures[count] = generating.measure(run, read_prepared(run), tmp_path / f"made-{count}", count, 1, Device())
    assert figures[2]["imagesPerSecond"] == figures[2]["outputsPerSecond"]
    assert figures[2]["flopsPerOutput"] == figures[1]["flopsPerOutput"]


def test_the_limit_is_what_a_product_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "MATRIX_SIDES", {"cpu": 64})
    assert 1e6 < generating.product_rate(Hardware("cpu", "fp32")) < 1e14


@pytest.mark.parametrize(
    ("stated", "expect"), [(None, 5e13), (7e13, 7e13)], ids=["the data sheet", "the administrator"]
)
def test_the_peak_is_what_is_said_of_the_gpu(stated: float | None, expect: float, tmp_path: Path) -> None:
    run = generate_run(tmp_path, [{"prompt": "a"}], task="text-generation", model={"path": "/m"})
    run = run.model_copy(update={"gpu": Gpu(peak_flops=stated)})
    assert generating.peak_of(run, Device("a GPU", 80, peak_flops=5e13)) == expect


class Job:
    kind = JobKind.FINE_TUNE


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("generate", "bench generate measures one GenerateJob, and the file has 0"),
        ("gpu", "bench gpu reads no manifest; remove --file, or use train or generate"),
    ],
)
def test_a_manifest_has_a_job_of_the_kind(which: str, message: str) -> None:
    with pytest.raises(Refused) as refused:
        benchmark.bench(which, [], [Job()])  # type: ignore[list-item]
    assert refused.value.problems == [message]
