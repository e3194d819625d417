"""Images of `generate`: bit-identical however rows are split, changed by what ought to change them, refused with a
reason.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.small_sdxl import write_small_lora

from luthier_api.exitcodes import ExitCode
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.ledger import shard_name
from luthier_trainer.generation.samples import SEEDS, Sample, sample_seed
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
        shards = [shard_name(i, run.spec.shards) for i in range(run.spec.shards)]
        return [
            line | {"content": (result / shards[line["row"] % run.spec.shards] / line["file_name"]).read_bytes()}
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


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.name)
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
        assert line["settings"]["format"] == name


def test_a_png_says_how_it_was_made(images: Images) -> None:
    (line,) = images([{"prompt": "eine Laute, schön", "negativePrompt": "rain", "seed": 7}])
    info = Image.open(io.BytesIO(line["content"])).info
    assert json.loads(info["luthier"]) == {
        "prompt": "eine Laute, schön",
        "negativePrompt": "rain",
        "seed": 7,
        "scheduler": "euler-ancestral",
        "steps": 2,
        "guidance": 5.0,
    }
    assert info["parameters"].startswith("eine Laute, schön\nNegative prompt: rain\nSteps: 2, Sampler: euler-ancestral")


def test_the_line_says_how_much_of_a_prompt_is_not_read(images: Images) -> None:
    """Of a prompt and of a negative one."""
    long = "x " * 100
    found = images([{"prompt": "a lute"}, {"prompt": long}, {"prompt": "a lute", "negativePrompt": long}])
    unread = [(line.get("unreadTokens"), line.get("unreadNegativeTokens")) for line in found]
    assert [tuple(count or 0 for count in counts) for counts in unread] == [
        (0, 0),
        (100 + 2 - 77, 0),
        (0, 100 + 2 - 77),
    ]


def test_prepare_says_which_prompts_are_not_read_to_their_end(sdxl: Path, tmp_path: Path) -> None:
    """By the text encoder that reads the least."""
    shutil.copytree(sdxl, tmp_path / "model")
    config = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 20}))
    rows = [{"prompt": "a lute", "negativePrompt": "x " * 19}, {"prompt": "x " * 30}, {"prompt": "x " * 18}]
    notices.forget()
    prepare.main(generate_run(tmp_path / "job", rows, task="text-to-image", model={"path": str(tmp_path / "model")}))
    behind = "longer than the 20 tokens that the text encoders read; their ends are not read, of"
    told = "tokens. Shorten them; each line of the result says how much is not read"
    assert notices.given() == [
        f"spec.inputs.columns.prompt: 1 of 3 are {behind} row 1 12 {told}",
        f"spec.inputs.columns.negativePrompt: 1 of 1 are {behind} row 0 1 {told}",
    ]


def test_the_order_of_rows_changes_no_file(images: Images) -> None:
    """With seeds of their own; others come from the row's number."""
    rows = [{"seed": i} | row for i, row in enumerate(ROWS)]
    order = [3, 0, 4, 1, 2]
    straight, permuted = digests(images(rows)), digests(images([rows[i] for i in order], shards=2))
    assert permuted == [straight[i] for i in order]


def test_an_image_that_is_not_finite_is_an_error_of_its_row(images: Images, sdxl: Path, tmp_path: Path) -> None:
    """A VAE that overflows, as that of Stable Diffusion XL does in fp16."""
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.inf)
    pipe.save_pretrained(tmp_path / "overflowing")
    with pytest.raises(Failure) as failure:
        images(model={"path": str(tmp_path / "overflowing")})
    assert failure.value.code is ExitCode.INVALID_DATASET
    assert "row 0: the image is not finite in fp32" in failure.value.message


def test_a_vae_that_asks_for_it_stays_in_fp32(sdxl: Path) -> None:
    run = generate_run(Path("/"), ROWS[:1], task="text-to-image", model={"path": str(sdxl)}, image=SMALL)
    engine = ImageEngine(run.spec, sdxl, [], Hardware("cpu", "fp16"), batch_size=1)
    (output,) = engine.make([Sample(0, 0, "a lute", None, 7)])
    assert output.file
    assert (engine.pipe.unet.dtype, engine.pipe.vae.dtype) == (torch.float16, torch.float32)
