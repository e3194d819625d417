"""Images of `generate`: bit-identical however rows are split, changed by what ought to change them, refused with a
reason.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from trainer.generating import generate_run, generate_shards, image_engine, result_lines, sample
from trainer.small_sdxl import write_small_lora, write_small_refiner

from luthier_api.exitcodes import ExitCode
from luthier_api.task_settings import ImageSettings
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.samples import SEEDS, sample_seed
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

ROWS = [
    {"prompt": "a lute on a bench", "seed": 7},
    {"prompt": "two lutes"},
    {"prompt": "a workshop", "negativePrompt": "people"},
    {"prompt": "strings"},
    {"prompt": "a bridge of maple", "negativePrompt": "rain"},
]
# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = {"width": 32, "height": 32, "steps": 2, "scheduler": "euler-ancestral"}

Images = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_lora(tmp_path_factory.mktemp("lora"), text_encoder=True)


@pytest.fixture
def images(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """The lines of a job over the small model, each with its file's `content`; keywords are fields of its spec."""

    def make(
        rows: list[dict[str, Any]] = ROWS[:2], image: dict[str, Any] | None = None, **spec: Any
    ) -> list[dict[str, Any]]:
        workspace = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        given = {"task": "text-to-image", "model": {"path": str(sdxl)}, "batchSize": 2, "image": SMALL | (image or {})}
        run = generate_run(workspace, rows, **given | spec)
        generate_shards(run, monkeypatch, prepare.main)
        result = WorkspaceFolder(workspace).result
        return [
            line | {"content": next(result.glob(f"shard-*/{line['file_name']}")).read_bytes()}
            if line["file_name"]
            else line
            for line in result_lines(run)
        ]

    return make


def digests(lines: list[dict[str, Any]]) -> list[str]:
    return [line["sha256"] for line in lines]


def pixels(line: dict[str, Any]) -> torch.Tensor:
    image = Image.open(io.BytesIO(line["content"]))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_files_are_the_same_however_rows_are_split(images: Images) -> None:
    one = images(ROWS)
    assert len(set(digests(one))) == len(ROWS)
    assert digests(images(ROWS, shards=2)) == digests(one)


def test_images_are_what_diffusers_draws(images: Images, sdxl: Path) -> None:
    """The plain pipeline, decoding included, within the rounding to 8 bits."""
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    for line in images(ROWS[1:3], image={"scheduler": "default", "guidance": 4.0}):
        expect = pipe(
            prompt=line["prompt"],
            negative_prompt=line.get("negativePrompt"),
            num_inference_steps=2,
            guidance_scale=4.0,
            width=32,
            height=32,
            generator=torch.Generator().manual_seed(line["seed"]),
        ).images[0]
        difference = pixels(line) - torch.frombuffer(bytearray(expect.tobytes()), dtype=torch.uint8).int()
        assert difference.abs().max() <= 1


def test_samples_of_a_row_have_seeds_of_their_own_that_rows_can_ask_for(images: Images) -> None:
    several = images([{"prompt": "a lute", "seed": 7}], image={"perPrompt": 3})
    assert [(line["seed"], line["file_name"]) for line in several] == [
        (7 + i, f"images/0000/000000-0{i}.png") for i in range(3)
    ]
    asked = images([{"prompt": "a lute", "seed": 7 + i} for i in range(3)])
    for one, other in zip(several, asked, strict=True):
        assert torch.equal(pixels(one), pixels(other))


@pytest.mark.parametrize(
    ("row_seed", "index", "seed"), [(0, 0, 0), (7, 2, 9), (SEEDS - 1, 0, SEEDS - 1), (SEEDS - 1, 1, 0)]
)
def test_sample_seed(row_seed: int, index: int, seed: int) -> None:
    assert sample_seed(row_seed, index) == seed


@dataclass(frozen=True)
class Case:
    name: str
    given: dict[str, Any]


CHANGES = [
    Case(
        name="another scheduler",
        given={"image": {"scheduler": "ddim"}},
    ),
    Case(
        name="more guidance",
        given={"image": {"guidance": 9.0}},
    ),
    Case(
        name="more steps",
        given={"image": {"steps": 3}},
    ),
    Case(
        name="another seed",
        given={"rows": [{"prompt": r["prompt"], "seed": 12345} for r in ROWS[:2]]},
    ),
    Case(
        name="negative prompts",
        given={"rows": [ROWS[0] | {"negativePrompt": "wood"}, ROWS[1] | {"negativePrompt": "wood"}]},
    ),
    Case(
        name="bf16",
        given={"precision": "bf16"},
    ),
]


@pytest.mark.parametrize("case", quick(CHANGES, "another scheduler", "another seed", "bf16"))
def test_what_images_depend_on(images: Images, case: Case) -> None:
    for before, after in zip(images(), images(**case.given), strict=True):
        assert not torch.equal(pixels(before), pixels(after))


def test_adapters(images: Images, lora: Path) -> None:
    def adapted(*weights: float) -> list[torch.Tensor]:
        return [pixels(line) for line in images(adapters=[{"path": str(lora), "weight": w} for w in weights])]

    plain, full = [pixels(line) for line in images()], adapted(1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, adapted(0.0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, full, strict=True))
    # Two halves are the whole, but for rounding.
    assert all((a - b).abs().max() <= 1 for a, b in zip(full, adapted(0.5, 0.5), strict=True))


FORMATS = [("png", "PNG", True), ("webp", "WEBP", True), ("jpeg", "JPEG", False)]


def test_formats(images: Images) -> None:
    reference = pixels(images()[0])
    for name, kind, lossless in FORMATS:
        line = images(image={"format": name})[0]
        assert Image.open(io.BytesIO(line["content"])).format == kind
        assert torch.equal(pixels(line), reference) is lossless
        if name == "png":
            luthier = json.loads(Image.open(io.BytesIO(line["content"])).info["luthier"])
            assert (luthier["settings"]["format"], luthier["settings"]["steps"]) == ("png", 2)


def test_prepare_says_which_prompts_are_too_long(sdxl: Path, tmp_path: Path) -> None:
    """By the text encoder that reads the least."""
    shutil.copytree(sdxl, tmp_path / "model")
    config = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 20}))
    rows = [{"prompt": "a lute", "negativePrompt": "x " * 19}, {"prompt": "x " * 30}, {"prompt": "x " * 18}]
    model = {"path": str(tmp_path / "model")}
    notices.forget()
    prepare.main(generate_run(tmp_path / "job", rows, task="text-to-image", model=model))
    told = "their outputs will be errors. Shorten them, or set image.longPrompts: chunk"
    assert notices.given() == [
        "spec.inputs.columns.prompt: 1 of 3 are longer than the 18 tokens that the text encoders read, that of row 1 by"
        f" 12; {told}",
        "spec.inputs.columns.negativePrompt: 1 of 1 are longer than the 18 tokens that the text encoders read, that of"
        f" row 0 by 1; {told}",
    ]
    notices.forget()
    image = {"longPrompts": "chunk"}
    prepare.main(generate_run(tmp_path / "long", rows, task="text-to-image", model=model, image=image))
    assert notices.given() == []


def test_a_prompt_that_is_too_long_is_an_error_of_its_row(images: Images) -> None:
    found = images([{"prompt": "a lute"}, {"prompt": "x " * 100}, {"prompt": "a lute", "negativePrompt": "x " * 76}])
    told = "tokens more than the text encoders read; shorten it, or set image.longPrompts: chunk"
    assert [line["error"] for line in found] == [None, f"the prompt has 25 {told}", f"the negative prompt has 1 {told}"]


def test_the_order_of_rows_changes_no_file(images: Images) -> None:
    """Nor its seed, which follows from the row."""
    order = [3, 0, 4, 1, 2]
    straight, permuted = digests(images(ROWS)), digests(images([ROWS[i] for i in order], shards=2))
    assert permuted == [straight[i] for i in order]


@pytest.mark.parametrize("shards", [1, 2])
def test_images_that_are_not_finite_are_errors_of_their_rows(
    images: Images, sdxl: Path, tmp_path: Path, shards: int
) -> None:
    """A VAE that overflows, as that of Stable Diffusion XL does in fp16. Without any other image the job fails."""
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.inf)
    pipe.save_pretrained(tmp_path / "overflowing")
    with pytest.raises(Failure, match=r"not one row .*: row \d: the image is not finite in fp32") as failure:
        images(model={"path": str(tmp_path / "overflowing")}, shards=shards)
    assert failure.value.code is ExitCode.INVALID_DATASET


def test_a_vae_that_asks_for_it_stays_in_fp32(sdxl: Path) -> None:
    engine = image_engine(sdxl, SMALL, batch_size=1, precision="fp16")
    (output,) = engine.make([sample("a lute", settings=ImageSettings.model_validate(SMALL))])
    assert output.file
    assert output.file()
    assert (engine.pipe.unet.dtype, engine.pipe.vae.dtype) == (torch.float16, torch.float32)


@dataclass(frozen=True)
class AsDiffusers:
    name: str
    image: dict[str, Any]
    """Fields of the spec."""
    call: dict[str, Any]
    """Arguments of the pipeline that mean the same."""
    prepare: Callable[[Any], object] = lambda pipe: None
    """What is done with the pipeline before."""


AS_DIFFUSERS = [
    AsDiffusers(
        name="rescaled guidance",
        image={"guidanceRescale": 0.7},
        call={"guidance_rescale": 0.7},
    ),
    AsDiffusers(
        name="tiles",
        image={"vaeTiling": True, "width": 64},
        call={"width": 64},
        prepare=lambda pipe: pipe.vae.enable_tiling(),
    ),
    AsDiffusers(
        name="slices of attention",
        image={"attentionSlicing": True},
        call={},
        prepare=lambda pipe: pipe.enable_attention_slicing(),
    ),
]


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
@pytest.mark.parametrize("case", AS_DIFFUSERS, ids=lambda case: case.name)
def test_settings_do_what_they_do_in_diffusers(case: AsDiffusers, kind: str, request: pytest.FixtureRequest) -> None:
    """For both kinds of pipelines, to the rounding of 8 bits. Without the setting, the image is another one."""
    folder = request.getfixturevalue(kind)
    image = SMALL | {"scheduler": "default", "guidance": 20.0}
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def expected(**call: Any) -> torch.Tensor:
        given = {"num_inference_steps": 2, "guidance_scale": 20.0, "width": 32, "height": 32} | call
        made = pipe("a lute", generator=torch.Generator().manual_seed(7), **given).images[0]
        return torch.frombuffer(bytearray(made.tobytes()), dtype=torch.uint8).int()

    plain = expected(**{name: size for name, size in case.call.items() if name == "width"})
    case.prepare(pipe)
    expect = expected(**case.call)
    (output,) = image_engine(folder, image | case.image, batch_size=1).make(
        [sample("a lute", settings=ImageSettings.model_validate(image | case.image))]
    )
    assert output.file
    made = pixels({"content": output.file()})
    assert (made - expect).abs().max() <= 1
    if case.name != "slices of attention":  # the same sums in another order
        assert (made - plain).abs().max() > 1


def test_slices_of_attention_are_computed_one_by_one(sdxl: Path) -> None:
    engine = image_engine(sdxl, SMALL | {"attentionSlicing": True})
    assert {type(processor).__name__ for processor in engine.pipe.unet.attn_processors.values()} == {
        "SlicedAttnProcessor"
    }


def test_stable_diffusion_1(images: Images, sd: Path, tmp_path: Path) -> None:
    """With negative prompts and without, and what `prepare` says of its safety checker."""
    shutil.copytree(sd, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(json.loads(index.read_text()) | {"safety_checker": checker}))
    pipe = DiffusionPipeline.from_pretrained(sd)
    pipe.set_progress_bar_config(disable=True)
    notices.forget()
    found = images(ROWS[1:3], model={"path": str(tmp_path / "model")}, image={"scheduler": "default", "guidance": 4.0})
    assert notices.given() == [
        "spec.model.path: its safety checker is not used, because it replaces images by black ones; none is checked"
        " (image.safety)"
    ]
    for line in found:
        expect = pipe(
            prompt=line["prompt"],
            negative_prompt=line["negativePrompt"],
            num_inference_steps=2,
            guidance_scale=4.0,
            width=32,
            height=32,
            generator=torch.Generator().manual_seed(line["seed"]),
        ).images[0]
        difference = pixels(line) - torch.frombuffer(bytearray(expect.tobytes()), dtype=torch.uint8).int()
        assert difference.abs().max() <= 1


def test_a_refiner_does_the_last_steps(images: Images, sdxl: Path, tmp_path: Path) -> None:
    """As diffusers' two pipelines do it one after the other, with the noise of one generator."""
    refiner = write_small_refiner(tmp_path / "refiner")
    settings = {"steps": 4, "refiner": {"path": str(refiner), "start": 0.5}}
    found = images(ROWS[1:3], image=settings)
    base, second = DiffusionPipeline.from_pretrained(sdxl), DiffusionPipeline.from_pretrained(refiner, vae=None)
    second.vae = base.vae
    for pipe in (base, second):
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
    for line in found:
        noise = torch.Generator().manual_seed(line["seed"])
        given = {
            "prompt": line["prompt"],
            "negative_prompt": line["negativePrompt"],
            "num_inference_steps": 4,
            "guidance_scale": 5.0,
            "generator": noise,
        }
        latents = base(**given, width=32, height=32, denoising_end=0.5, output_type="latent").images
        expect = second(**given, image=latents, denoising_start=0.5).images[0]
        difference = pixels(line) - torch.frombuffer(bytearray(expect.tobytes()), dtype=torch.uint8).int()
        assert difference.abs().max() <= 1
        made_of = json.loads(Image.open(io.BytesIO(line["content"])).info["luthier"])["settings"]
        assert made_of["refinerModel"]["source"] == str(refiner)
    plain = images(ROWS[1:3], image={"steps": 4})
    assert not set(digests(plain)) & set(digests(found))


@dataclass(frozen=True)
class WrongRefiner:
    name: str
    message: str
    image: dict[str, Any] = field(default_factory=dict)
    refiner: dict[str, Any] = field(default_factory=dict)
    base: str = "sdxl"
    folder: str = "refiner"


WRONG_REFINERS = [
    WrongRefiner(
        name="no step is left",
        refiner={"start": 0.9995},
        image={"steps": 4},
        message="spec.image.refiner.start: at 0.9995 of 4 steps one of the two models has no step to do",
    ),
    WrongRefiner(
        name="a base model",
        folder="sdxl",
        message="spec.image.refiner: StableDiffusionXLPipeline is not supported here;",
    ),
    WrongRefiner(
        name="of another kind of model",
        base="sd",
        message="spec.model: StableDiffusionPipeline is not supported here; supported: StableDiffusionXLPipeline",
    ),
]


@pytest.mark.parametrize("case", WRONG_REFINERS, ids=lambda case: case.name)
def test_a_refiner_that_does_not_fit_ends_in_prepare(
    case: WrongRefiner, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folders = {"refiner": write_small_refiner(tmp_path / "refiner"), "sdxl": request.getfixturevalue("sdxl")}
    run = generate_run(
        tmp_path / "job",
        ROWS[:1],
        task="text-to-image",
        model={"path": str(request.getfixturevalue(case.base))},
        image=SMALL | case.image | {"refiner": {"path": str(folders[case.folder])} | case.refiner},
    )
    with pytest.raises(Failure) as failure:
        prepare.main(run)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith(case.message)
