"""Images of images: those of diffusers' own pipelines, each alone, and the same bits however rows are split."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases.quick import quick
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, EulerAncestralDiscreteScheduler
from PIL import Image
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.small_sdxl import write_small_sd

from luthier_api.exitcodes import ExitCode
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.pictures import Pictures
from luthier_trainer.prepare.generation_files import report_distorted
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Line = dict[str, Any]
SIDE = 32
SMALL = {"width": SIDE, "height": SIDE, "steps": 4, "guidance": 4.0, "strength": 0.6}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and masks, not of the size that is made."""
    folder = tmp_path_factory.mktemp("drawings")
    random = numpy.random.default_rng(0)
    for i in range(3):
        blocks = random.integers(0, 255, (2, 3, 3), dtype=numpy.uint8)
        Image.fromarray(blocks).resize((60, 40)).save(folder / f"{i}.png")
        mask = numpy.zeros((40, 60), dtype=numpy.uint8)
        mask[:, : 20 + 10 * i] = 255
        Image.fromarray(mask).save(folder / f"mask{i}.png")
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_sd(tmp_path_factory.mktemp("sd"))


Images = Callable[..., list[Line]]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """The lines of a job, each with the pixels of its file; keywords are fields of its spec."""

    def make(model: Path, rows: list[Line], image: Line, **spec: Any) -> list[Line]:
        workspace = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        given = {"task": "image-to-image", "model": {"path": str(model)}, "batchSize": 2, "image": SMALL | image}
        run = generate_run(workspace, rows, **given | spec)
        generate_shards(run, monkeypatch, prepare)
        result = WorkspaceFolder(workspace).result
        return [
            line | {"pixels": numpy.asarray(Image.open(next(result.glob(f"shard-*/{line['file_name']}")))).astype(int)}
            if line["file_name"]
            else line
            for line in result_lines(run)
        ]

    return make


def rows_of(drawings: Path) -> list[Line]:
    """With and without masks."""
    return [
        {"prompt": "a lute", "initImage": str(drawings / "0.png"), "seed": 3},
        {"prompt": "an oud", "initImage": str(drawings / "1.png"), "mask": str(drawings / "mask1.png"), "seed": 4},
        {"prompt": "a saz", "initImage": str(drawings / "2.png"), "seed": 5},
        {"prompt": "a harp", "initImage": str(drawings / "0.png"), "mask": str(drawings / "mask0.png"), "seed": 6},
        {"prompt": "a viol", "initImage": str(drawings / "1.png"), "seed": 7},
    ]


def of_diffusers(model: Path, row: Line, scheduler: type | None) -> Any:
    """The pixels that plain diffusers makes of a row."""
    kind = AutoPipelineForInpainting if "mask" in row else AutoPipelineForImage2Image
    pipe = kind.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    more = {"mask_image": Image.open(row["mask"]), "width": SIDE, "height": SIDE} if "mask" in row else {}
    made = pipe(
        prompt=row["prompt"],
        image=Image.open(row["initImage"]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS),
        num_inference_steps=4,
        guidance_scale=4.0,
        strength=0.6,
        generator=torch.Generator().manual_seed(row["seed"]),
        **more,
    ).images[0]
    return numpy.asarray(made).astype(int)


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    image: Line = field(default_factory=dict)
    scheduler: type | None = None


CASES = [
    Case(name="Stable Diffusion XL", model="sdxl"),
    Case(
        name="Stable Diffusion 1.5, another scheduler",
        model="sd",
        image={"scheduler": "euler-ancestral"},
        scheduler=EulerAncestralDiscreteScheduler,
    ),
]


@pytest.mark.parametrize("case", quick(CASES, "Stable Diffusion XL"))
def test_images_are_those_of_diffusers(
    case: Case, drawings: Path, images: Images, request: pytest.FixtureRequest
) -> None:
    """Within the rounding of a batch; and the same bits whatever their neighbours and the number of shards are."""
    model, rows = request.getfixturevalue(case.model), rows_of(drawings)
    found = images(model, rows, case.image)
    for row, line in zip(rows, found, strict=True):
        assert abs(line["pixels"] - of_diffusers(model, row, case.scheduler)).max() <= 1, row["prompt"]
    order = [4, 1, 0, 2]
    other = images(model, [rows[i] for i in order], case.image, shards=3)
    assert [line["sha256"] for line in other] == [found[i]["sha256"] for i in order]


def test_what_is_left_of_an_image(sdxl: Path, drawings: Path, images: Images) -> None:
    """Strength is of the row or of the job, and an image that is gone is an error of its row."""
    row = rows_of(drawings)[0]
    found = images(
        sdxl,
        [
            row,
            row | {"overrides": {"image": {"strength": 0.9}}},
            row | {"overrides": {"image": {"strength": 0.1}}},
            row | {"initImage": str(drawings / "gone.png")},
            row | {"mask": str(drawings / "gone.png")},
        ],
        {},
    )
    assert found[0]["sha256"] != found[1]["sha256"]
    assert found[2]["error"] == ("spec.image.strength: of 4 steps 0.1 are less than one; raise strength or image.steps")
    assert found[3]["error"] == f"initImage: {drawings}/gone.png: No such file or directory"
    assert found[4]["error"] == f"mask: {drawings}/gone.png: No such file or directory"


SIZES = [
    ((SIDE, SIDE), {}, False),
    ((4 * SIDE, 4 * SIDE), {}, False),
    ((10 * SIDE + 1, 10 * SIDE), {}, False),  # another one is not possible: sizes are multiples of 8
    ((2 * SIDE, SIDE), {}, True),
    ((2 * SIDE, SIDE), {"width": 2 * SIDE}, False),
]


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize(("size", "settings", "told"), SIZES)
def test_images_that_change_their_shape_are_told(
    tmp_path: Path, size: tuple[int, int], settings: Line, told: bool, turned: bool
) -> None:
    """Exif may say that the sides are to be exchanged."""
    content, exif = io.BytesIO(), Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.new("RGB", size[::-1] if turned else size).save(content, "PNG", exif=exif)
    image = {"width": SIDE, "height": SIDE}
    given = [{"prompt": "a lute", "initImage": "/lute.png"}]
    run = generate_run(tmp_path, given, task="image-to-image", model={"path": "/m"}, image=image)
    name = Pictures(WorkspaceFolder(tmp_path)).keep(content.getvalue())
    rows = [{"row": 0, "error": "gone"}, {"row": 1, "initImage": name, "settings": settings}]
    report_distorted(run, rows)
    given = notices.given()
    assert [f"first: row 1, {size[0]} × {size[1]} becomes {SIDE} × {SIDE}" in text for text in given] == [True] * told


@dataclass(frozen=True)
class RefusedCase:
    name: str
    image: Line
    message: str


REFUSED = [
    RefusedCase(
        name="no step is left",
        image={"strength": 0.2},
        message="spec.image.strength: of 4 steps 0.2 are less than one",
    ),
    RefusedCase(
        name="what diffusers lacks for it",
        image={"guidanceRescale": 0.5},
        message="spec.image.guidanceRescale: diffusers",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_settings_that_have_no_effect_are_refused(case: RefusedCase, sd: Path, drawings: Path, images: Images) -> None:
    with pytest.raises(Failure, match=case.message) as failure:
        images(sd, rows_of(drawings)[:1], case.image)
    assert failure.value.code is ExitCode.INVALID_SPEC
