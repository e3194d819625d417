"""What images need of a GPU, against what they really hold on a CPU, and what is chosen so that they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from trainer.generating import generate_run
from trainer.small_checker import write_checker
from trainer.small_sdxl import write_small_refiner

from luthier_api.exitcodes import ExitCode
from luthier_api.run import Gpu
from luthier_api.status import Memory, Plan
from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation import image_memory
from luthier_trainer.generation.image_memory import Work, memory_of, parts_of
from luthier_trainer.prepare.image_plan import fitted
from luthier_trainer.runtime.failure import Failure
from trainer import measured_memory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZE = 192
PLAN = Plan(strategy="none", precision="bf16", rows_per_shard=100)
MODEL = "spec.model"


@pytest.fixture(autouse=True, scope="module")
def computed_once() -> Iterator[None]:
    """The same models and the same work are computed once."""
    known: dict[str, dict[str, image_memory.Part]] = {}
    compute = image_memory.parts_of

    def parts(path: Path, image: ImageSettings, work: Work, field: str) -> dict[str, image_memory.Part]:
        key = str((path, image.vae_tiling, image.attention_slicing, work))
        if key not in known:
            known[key] = compute(path, image, work, field)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(image_memory, "parts_of", parts)
        yield


def stored(folder: Path) -> dict[str, int]:
    """Model of a pipeline → bytes of its weights in 16 bits, by its files."""
    return {
        file.parent.name: sum(2 * weight.numel() for weight in load_file(file).values())
        for file in sorted(folder.glob("*/*.safetensors"))
    }


def fit(model: Path, spec: dict[str, Any], gpu: int | None = None, plan: Plan = PLAN, **paths: Path) -> Plan:
    rows = [{"prompt": "a lute"}]
    image = {"width": 32, "height": 32} | spec.get("image", {})
    given = {"task": "text-to-image", "model": {"path": str(model)}, "resources": {"gpus": 1}} | spec | {"image": image}
    run = generate_run(Path("/w"), rows, **given)
    if gpu is not None:
        run = run.model_copy(update={"gpu": Gpu(memory=gpu)})
    return fitted(run, plan, {MODEL: model, **paths}, [{"settings": {"width": SIZE, "height": SIZE}}])


def work(**change: Any) -> Work:
    given = {"images": 2, "width": SIZE, "height": SIZE, "guided": True, "dtype": torch.float32, "encodes": False}
    return Work(**given | change)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_held_is_what_a_cpu_holds(sdxl: Path) -> None:
    image = generate_run(Path("/w"), [{"prompt": "-"}], task="text-to-image", model={"path": "/m"}).spec.image
    parts = parts_of(sdxl, image, work(), MODEL)
    unet = UNet2DConditionModel.from_pretrained(sdxl / "unet")
    vae = AutoencoderKL.from_pretrained(sdxl / "vae")
    side = SIZE // 2
    latents, texts = torch.randn(4, 4, side, side), torch.randn(4, 77, 64)
    told = {"text_embeds": torch.randn(4, 32), "time_ids": torch.randn(4, 6)}
    real = measured_memory.peak_of(
        lambda: unet(latents, torch.tensor(5), encoder_hidden_states=texts, added_cond_kwargs=told)
    )
    assert parts["unet"].held == pytest.approx(real, rel=0.1)
    # The convolutions of CPUs hold copies in a layout of their own.
    assert parts["vae"].held == pytest.approx(measured_memory.peak_of(lambda: vae.decode(latents[:1])), rel=0.15)
    tiled = parts_of(sdxl, image.model_copy(update={"vae_tiling": True}), work(), MODEL)["vae"].held
    vae.enable_tiling()
    assert measured_memory.peak_of(lambda: vae.decode(latents[:1])) < tiled * 1.15 < parts["vae"].held / 2
    unguided = parts_of(sdxl, image, work(guided=False, images=4), MODEL)
    assert unguided["unet"].held == parts["unet"].held
    assert parts_of(sdxl, image, work(images=4), MODEL)["unet"].held > 1.5 * parts["unet"].held
    assert parts_of(sdxl, image, work(encodes=True), MODEL)["vae"].held >= parts["vae"].held


def test_weights_that_are_there(sdxl: Path) -> None:
    files = stored(sdxl)
    image = generate_run(Path("/w"), [{"prompt": "-"}], task="text-to-image", model={"path": "/m"}).spec.image
    parts = parts_of(sdxl, image, work(dtype=torch.bfloat16), MODEL)
    weights = {name: memory_of(parts, name).gpu["weights"] for name in ("none", "models", "layers")}
    assert weights["none"] == pytest.approx(sum(files.values()), rel=0.01)
    assert weights["models"] == pytest.approx(max(files["unet"] + files["vae"], files["vae"]), rel=0.01)
    largest = max(
        2 * sum(w.numel() for w in module.parameters(recurse=False))
        for model in (UNet2DConditionModel, AutoencoderKL)
        for module in model.from_pretrained(sdxl / ("unet" if model is UNet2DConditionModel else "vae")).modules()
    )
    assert weights["layers"] <= largest


def test_the_refiner_is_there_too(sdxl: Path, tmp_path: Path) -> None:
    refiner = write_small_refiner(tmp_path / "refiner")
    one, both = fit(sdxl, {}).memory, fit(sdxl, {}, **{"spec.image.refiner": refiner}).memory
    assert one
    assert both
    assert both.gpu["weights"] - one.gpu["weights"] == pytest.approx(sum(stored(refiner).values()), rel=0.01)


def test_the_model_that_checks_images_stays_on_the_gpu(sdxl: Path, tmp_path: Path) -> None:
    """In fp32, whatever else waits in the memory of the node."""
    checker = write_checker(tmp_path / "checker")
    weights = 4 * sum(weight.numel() for weight in load_file(checker / "model.safetensors").values())
    safety = {"path": str(checker), "labels": ["nsfw"]}
    for offload in ("none", "models", "layers"):
        without = fit(sdxl, {"image": {"offload": offload}}).memory
        memory = fit(sdxl, {"image": {"offload": offload, "safety": safety}}, **{"spec.image.safety": checker}).memory
        assert without
        assert memory
        assert memory.gpu["weights"] - without.gpu["weights"] == weights
        assert (
            memory.gpu["activations"] == without.gpu["activations"]
        )  # it looks at small images, when all else is done
        assert memory.host_bytes - without.host_bytes == weights


@dataclass(frozen=True)
class Case:
    name: str
    limit: Callable[[dict[str, Memory]], int]
    """What each choice needs → the memory of the GPU."""
    expect: str
    """The choice, or how the refusal begins that names field and remedy."""
    image: dict[str, Any] = field(default_factory=dict)
    said: str = ""


CASES = [
    Case("all fits", lambda needs: needs["none"].gpu_bytes, "none"),
    Case(
        "models wait",
        lambda needs: needs["none"].gpu_bytes - 1,
        "models",
        said="image.offload: models, because a batch",
    ),
    Case("layers wait", lambda needs: needs["models"].gpu_bytes - 1, "layers", said="image.offload: layers, because"),
    Case(
        "nothing helps but fewer images",
        lambda needs: needs["layers"].gpu_bytes - 1,
        "spec.resources.gpuMemory: a batch of 4 images of 192 × 192 needs",
        said="batchSize: 2 (",
    ),
    Case(
        "the job wants all on the GPU",
        lambda needs: needs["models"].gpu_bytes,
        "spec.resources.gpuMemory: a batch of 4 images of 192 × 192 needs",
        image={"offload": "none"},
        said="image.offload: auto (",
    ),
    Case("the job wants layers", lambda needs: needs["none"].gpu_bytes, "layers", image={"offload": "layers"}),
]


@pytest.fixture(scope="module")
def needs(sdxl: Path) -> dict[str, Memory]:
    """What each choice needs, if the job makes it."""
    found = {name: fit(sdxl, {"image": {"offload": name}}).memory for name in ("none", "models", "layers")}
    return {name: memory for name, memory in found.items() if memory}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_chosen(case: Case, needs: dict[str, Memory], sdxl: Path) -> None:
    limit, given = case.limit(needs), {"image": case.image}
    if case.expect not in needs:
        with pytest.raises(Failure) as failed:
            fit(sdxl, given, limit)
        assert failed.value.code == ExitCode.DOES_NOT_FIT
        assert failed.value.message.startswith(case.expect)
        assert case.said in failed.value.message
        return
    plan = fit(sdxl, given, limit)
    assert (plan.offload, plan.memory) == (case.expect, needs[case.expect])
    assert [reason[: len(case.said)] for reason in plan.reasons] == ([case.said] if case.said else [])


def test_without_a_limit_nothing_waits(sdxl: Path) -> None:
    plan = fit(sdxl, {})
    assert (plan.offload, plan.reasons) == ("none", [])
    assert plan.memory
    assert plan.memory.gpu_bytes > 2**30


def test_what_the_user_says_of_the_memory_comes_before_the_class(sdxl: Path, needs: dict[str, Memory]) -> None:
    given = {"resources": {"gpus": 1, "gpuMemory": "80Gi"}}
    assert fit(sdxl, given, needs["none"].gpu_bytes - 1).offload == "none"


def test_on_a_cpu_nothing_is_planned(sdxl: Path) -> None:
    plan = fit(sdxl, {"resources": {"gpus": 0}})
    assert (plan.offload, plan.memory) == ("none", None)


def test_a_batch_has_no_more_images_than_the_job(sdxl: Path) -> None:
    few = fit(sdxl, {"batchSize": 64}, plan=PLAN.model_copy(update={"rows_per_shard": 2})).memory
    assert few == fit(sdxl, {"batchSize": 2}).memory
