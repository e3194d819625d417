"""Sizes of images by aspect ratio: those that diffusers chooses, in each row and its plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from trainer.generating import generate_run

from luthier_api.task_settings import AspectRatio
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import rows as prepared_rows
from luthier_trainer.generation.overrides import with_overrides
from luthier_trainer.generation.sizes import size_of, trained_side
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from trainer import small_flow

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(("side", "table"), [(512, ASPECT_RATIO_512_BIN), (1024, ASPECT_RATIO_1024_BIN)])
def test_sizes_are_those_of_diffusers(side: int, table: dict[str, list[float]]) -> None:
    for ratio in get_args(AspectRatio):
        width, height = map(int, ratio.split(":"))
        expect = PixArtImageProcessor.classify_height_width_bin(height, width, ratios=table)
        assert size_of(ratio, side) == (expect[1], expect[0])
        assert expect[1] / expect[0] == pytest.approx(width / height, rel=0.07), "another shape than its name"
    assert size_of("1:1", side) == (side, side)


def test_what_models_were_trained_with(sdxl: Path, tmp_path: Path) -> None:
    assert trained_side(sdxl, "spec.model") == 32
    assert trained_side(small_flow.write(small_flow.flux(), tmp_path / "flux"), "spec.model") == 256


@pytest.fixture(scope="module")
def model(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained with 512 pixels."""
    folder = tmp_path_factory.mktemp("models") / "of-512"
    shutil.copytree(sdxl, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 256}))
    return folder


def prepared(workspace: Path, model: Path, rows: list[dict[str, Any]], image: dict[str, Any]) -> list[Any]:
    """The samples of a job after `prepare`."""
    notices.forget()
    run = generate_run(workspace, rows, task="text-to-image", model={"path": str(model)}, image=image)
    prepare.main(run)
    path = WorkspaceFolder(workspace).prepared / "rows.jsonl"
    return list(prepared_rows.Samples(path, run.spec.settings, 1, with_overrides).between(0, len(rows)))


def test_each_row_has_its_size(model: Path, tmp_path: Path) -> None:
    """Of its own aspect ratio, of the job's, or as the row says it; and the line of its output names it."""
    rows: list[dict[str, Any]] = [
        {"prompt": "a lute"},
        {"prompt": "two lutes", "overrides": {"image": {"aspectRatio": "9:16", "steps": 3}}},
        {"prompt": "strings", "overrides": {"image": {"width": 64}}},
    ]
    found = prepared(tmp_path / "job", model, rows, {"aspectRatio": "16:9"})
    assert [(s.settings.width, s.settings.height) for s in found[:2]] == [(672, 384), (384, 672)]
    assert found[0].facts()["settings"] == {"width": 672, "height": 384}
    assert found[1].facts()["settings"] == {"aspectRatio": "9:16", "steps": 3, "width": 384, "height": 672}
    assert found[2].problem == "image.aspectRatio: decides on width and height; remove them, or aspectRatio"
    told = [text for text in notices.given() if "aspectRatio" in text and "drawn" in text]
    assert told == [
        f"spec.image.aspectRatio: {r} is drawn with {s}" for r, s in (("16:9", "672 × 384"), ("9:16", "384 × 672"))
    ]
    plain = prepared(tmp_path / "plain", model, rows[:1], {})
    assert plain[0].seed == found[0].seed
    assert plain[0].facts()["settings"] is None


def test_a_model_without_known_sizes(sdxl: Path, tmp_path: Path) -> None:
    message = "image.aspectRatio: the model was trained with images of 32 pixels, and sizes are known for 512 and 1024;"
    with pytest.raises(Failure, match=f"^spec.{message}"):
        prepared(tmp_path / "job", sdxl, [{"prompt": "a lute"}], {"aspectRatio": "16:9"})
    rows = [{"prompt": "a lute"}, {"prompt": "a lute", "overrides": {"image": {"aspectRatio": "1:1"}}}]
    good, bad = prepared(tmp_path / "rows", sdxl, rows, {"width": 32, "height": 32, "steps": 1})
    assert good.problem is None
    assert bad.problem
    assert bad.problem.startswith("image.aspectRatio")
