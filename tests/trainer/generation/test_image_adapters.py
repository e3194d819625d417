"""Adapters of text-to-image through `prepare`: LoRA files as diffusers and the sites of LoRAs have them, alone and
without a configuration.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.server import Running
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.small_sdxl import write_small_lora

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models.adapter_file import LORA_WEIGHTS, choose
from luthier_trainer.prepare.main import main
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.prepared import read_prepared

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclass(frozen=True)
class Choice:
    name: str
    files: list[str]
    asked: str | None
    expect: str
    """The file, or the refusal behind the field."""
    notice: str | None = None


CHOICES = [
    Choice(
        name="one file, whatever its name",
        files=["README.md", "pixel-art-xl.safetensors"],
        asked=None,
        expect="pixel-art-xl.safetensors",
    ),
    Choice(
        name="one file in a folder",
        files=["README.md", "sdxl/ink.safetensors"],
        asked=None,
        expect="sdxl/ink.safetensors",
    ),
    Choice(
        name="several, and one is asked for",
        files=["ink.safetensors", "oil.safetensors"],
        asked="oil.safetensors",
        expect="oil.safetensors",
    ),
    Choice(
        name="several, and none is asked for",
        files=["ink.safetensors", "oil.safetensors"],
        asked=None,
        expect=(
            ": model a/b has 2 .safetensors files (ink.safetensors, oil.safetensors); choose one with"
            " spec.adapters[0].file"
        ),
    ),
    Choice(
        name="diffusers' own beside those of checkpoints",
        files=["checkpoint-500/pytorch_lora_weights.safetensors", LORA_WEIGHTS],
        asked=None,
        expect=LORA_WEIGHTS,
        notice=(
            "spec.adapters[0]: model a/b has 2 .safetensors files; pytorch_lora_weights.safetensors is used, and not"
            " checkpoint-500/pytorch_lora_weights.safetensors. Set spec.adapters[0].file for another"
        ),
    ),
    Choice(
        name="one that is not there",
        files=["ink.safetensors", "oil.safetensors"],
        asked="inc.safetensors",
        expect=(
            ".file: model a/b has no file 'inc.safetensors' (it has: ink.safetensors, oil.safetensors). Did you mean"
            " 'ink.safetensors'?"
        ),
    ),
    Choice(
        name="a pickle",
        files=["pytorch_lora_weights.bin"],
        asked=None,
        expect=(
            ": model a/b has its weights only as pytorch_lora_weights.bin. Files that can run code are not opened;"
            " convert it to safetensors, or choose another"
        ),
    ),
    Choice(
        name="a whole pipeline",
        files=["model_index.json", "unet/diffusion_pytorch_model.safetensors"],
        asked=None,
        expect=(
            ": model a/b is a whole model, not an adapter (it has model_index.json); use it as spec.model, or name the"
            " adapter's file in spec.adapters[0].file"
        ),
    ),
    Choice(
        name="nothing",
        files=["README.md"],
        asked=None,
        expect=": model a/b has no weights (*.safetensors); it has: README.md",
    ),
]


@pytest.mark.parametrize("case", CHOICES, ids=[c.name for c in CHOICES])
def test_which_file_is_the_adapter(case: Choice) -> None:
    notices.forget()
    field = "spec.adapters[0]"
    if case.expect.endswith(".safetensors"):
        assert choose(case.files, case.asked, field, "model a/b") == case.expect
        assert notices.given() == [case.notice] * bool(case.notice)
    else:
        with pytest.raises(Failure) as failure:
            choose(case.files, case.asked, field, "model a/b")
        assert failure.value.message == field + case.expect


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two LoRA files, as the sites of LoRAs have them."""
    folder = tmp_path_factory.mktemp("styles")
    for seed, name in enumerate(("ink", "oil")):
        written = write_small_lora(folder / name, seed=seed)
        shutil.move(written / LORA_WEIGHTS, folder / f"{name}.safetensors")
        written.rmdir()
    return folder


Draw = Callable[..., list[str]]


@pytest.fixture
def draw(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Digests of the images of a job, prepared and run; keywords are fields of its spec."""

    def make(**spec: Any) -> list[str]:
        workspace = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        given = {
            "task": "text-to-image",
            "model": {"path": str(sdxl)},
            "image": {"width": 32, "height": 32, "steps": 2, "scheduler": "ddim", "metadata": []},
        }
        run = generate_run(workspace, [{"prompt": "a lute", "seed": 7}], **given | spec)
        generate_shards(run, monkeypatch, main)
        return [line["sha256"] for line in result_lines(run)]

    return make


def test_an_adapter_by_path_and_by_id(draw: Draw, hub: Running, styles: Path) -> None:
    hub.store.seed("model", "me/styles", styles)
    plain = draw()
    for file in ("ink.safetensors", "oil.safetensors"):
        by_path = draw(adapters=[{"path": str(styles), "file": file}])
        by_id = draw(adapters=[{"id": "me/styles", "file": file}])
        assert by_path == by_id != plain
        plain = by_path  # and the next file gives another image


def test_the_example_of_the_readme(draw: Draw, hub: Running, sdxl: Path, styles: Path, tmp_path: Path) -> None:
    """Its model and adapter by the names that it gives them, of a Hub that has small ones; smaller images than it asks
    for.
    """
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    blocks = [block.removeprefix("yaml\n") for block in readme.split("```")[1::2] if block.startswith("yaml\n")]
    (example,) = (manifest for manifest in map(yaml.safe_load, blocks) if manifest["kind"] == "GenerateJob")
    spec = example["spec"]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(styles / "ink.safetensors", alone / "pixel-art-xl.safetensors")
    hub.store.seed("model", spec["model"]["id"], sdxl)
    hub.store.seed("model", spec["adapters"][0]["id"], alone)
    spec["image"] |= {"width": 32, "height": 32, "steps": 2}
    images = draw(**{name: spec[name] for name in ("model", "adapters", "inputs", "image", "shards")})
    assert len(set(images)) == spec["image"]["perPrompt"]


def test_only_the_chosen_file_is_read(styles: Path, sdxl: Path, tmp_path: Path) -> None:
    """What else a folder of adapters holds may change while the job is under way; the file itself may not."""
    folder = tmp_path / "styles"
    shutil.copytree(styles, folder)
    run = generate_run(
        tmp_path / "job",
        [{"prompt": "a lute"}],
        task="text-to-image",
        model={"path": str(sdxl)},
        adapters=[{"path": str(folder), "file": "ink.safetensors"}],
    )
    main(run)
    assert read_prepared(run).adapter_paths == [str(folder / "ink.safetensors")]
    shutil.copy(folder / "ink.safetensors", folder / "oil.safetensors")
    main(run)
    shutil.copy(styles / "oil.safetensors", folder / "ink.safetensors")
    with pytest.raises(
        Failure, match=r"spec\.adapters\[0\]\.path: .*ink\.safetensors has changed since this job was prepared"
    ) as failure:
        main(run)
    assert failure.value.code is ExitCode.INVALID_SPEC
