"""Images that a second model checks (`image.safety`): scores as plain transformers gives them, and what becomes of
images that are unsafe.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.server import Running
from PIL import Image
from trainer.generating import generate_run, generate_shards, result_lines, sample
from trainer.small_checker import LABELS, write_checker
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import ledger
from luthier_trainer.generation.engines.images import ImageEngine
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.result import UNSAFE_ROWS
from luthier_trainer.generation.samples import Output
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish.model_card import dataset_card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.workspace.prepared import read_prepared

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROWS = [{"prompt": prompt} for prompt in ("a lute on a bench", "two lutes", "a workshop", "strings", "a bridge")]
SMALL = {"width": 32, "height": 32, "steps": 2, "scheduler": "euler"}
UNSAFE = ["nsfw", "gore"]


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checker(tmp_path_factory.mktemp("checker"))


Job = tuple[list[dict[str, Any]], list[dict[str, float]], Path, str]
"""Lines, metrics of the shards, folder of the result, and dataset card."""


@pytest.fixture
def job(sdxl: Path, checker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    def make(safety: dict[str, Any] | None, rows: list[dict[str, Any]] = ROWS, **spec: Any) -> Job:
        workspace = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        checked = {"safety": {"path": str(checker), "labels": UNSAFE} | safety} if safety is not None else {}
        given = {"task": "text-to-image", "model": {"path": str(sdxl)}, "batchSize": 2, "image": SMALL | checked}
        run = generate_run(workspace, rows, **given | spec)
        messages = generate_shards(run, monkeypatch, prepare.main)
        result = WorkspaceFolder(workspace).result
        card = dataset_card(run, read_prepared(run), result)
        return result_lines(run), [message.metrics or {} for message in messages], result, card

    return make


def plain_scores(checker: Path, files: list[Path]) -> list[float]:
    """What transformers alone says of files."""
    model = AutoModelForImageClassification.from_pretrained(checker).eval()
    processor = AutoImageProcessor.from_pretrained(checker, backend="pil")
    wanted = [LABELS.index(label) for label in UNSAFE]
    found = []
    for file in files:
        with torch.no_grad():
            logits = model(**processor(Image.open(file), return_tensors="pt")).logits
        found.append(float(torch.softmax(logits, -1)[0, wanted].sum()))
    return found


def test_scores_flags_and_what_is_withheld(
    job: Callable[..., Job], checker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any shards, batches and neighbours. With `flag` there are the same images as without a check."""
    served: dict[str, float] = {}
    monkeypatch.setattr(Telemetry, "set", lambda self, metric, value, *labels: served.update({metric.name: value}))
    unchecked, _, before, card = job(None)
    assert all(line["unsafeScore"] is None and line["unsafe"] is None for line in unchecked)
    assert "Of them unsafe" not in card
    assert "luthier_generate_unsafe_rows" not in served
    files = [before / "shard-00000-of-00001" / line["file_name"] for line in unchecked]
    expect = plain_scores(checker, files)
    assert max(expect) - min(expect) > 1e-3
    middle = sorted(expect)[2]  # two images are above it, and one is at it
    threshold = (middle + sorted(expect)[1]) / 2

    flagged, metrics, result, card = job({"threshold": threshold})
    told = notices.given()
    assert [line["unsafeScore"] for line in flagged] == pytest.approx(expect, abs=1e-6)
    assert [line["unsafe"] for line in flagged] == [score >= threshold for score in expect]
    assert [line["error"] for line in flagged] == [None] * len(ROWS)
    assert (metrics[0][UNSAFE_ROWS], metrics[0]["failedRows"]) == (3, 0)
    assert served["luthier_generate_unsafe_rows"] == 3
    assert "spec.image.safety: 3 of 5 images are unsafe; they are kept, with unsafe: true in their lines" in told
    assert "| Of them unsafe | 3 |" in card
    for line, file in zip(flagged, files, strict=True):
        kept = Image.open(result / "shard-00000-of-00001" / line["file_name"])
        assert kept.tobytes() == Image.open(file).tobytes()
        assert json.loads(kept.info["luthier"])["settings"]["safetyModel"]["source"] == str(checker)

    withheld, metrics, result, card = job({"threshold": threshold, "policy": "withhold"}, shards=2)
    assert [line["unsafeScore"] for line in withheld] == [line["unsafeScore"] for line in flagged]
    assert sum(one[UNSAFE_ROWS] for one in metrics) == sum(one["failedRows"] for one in metrics) == 3
    assert "| Of them unsafe | 3 |" in card
    assert "| Of them failed | 3 |" in card
    for line in withheld:
        assert (line["file_name"] is None) is line["unsafe"]
        assert (line["error"] or "").startswith("image.safety: withheld, because its score of 0.") is line["unsafe"]
    assert len(list(result.rglob("*.png"))) == 2


def test_a_model_of_the_hub_is_fixed_to_a_commit(sdxl: Path, checker: Path, hub: Running, tmp_path: Path) -> None:
    """And fetched in `prepare`, whereas one that has pickles alone is refused before."""
    commit = hub.store.seed("model", "org/checker", checker).oid
    pickled(copied := Path(shutil.copytree(checker, tmp_path / "pickled")))
    hub.store.seed("model", "org/pickled", copied)

    def run_with(name: str) -> GenerateRun:
        safety = {"id": name, "labels": UNSAFE}
        given = {"task": "text-to-image", "model": {"path": str(sdxl)}, "image": SMALL | {"safety": safety}}
        return generate_run(tmp_path / name, ROWS[:1], **given)

    prepare.main(run_with("org/checker"))
    record = read_prepared(run_with("org/checker"))
    assert record.safety
    assert (record.safety.source, record.safety.revision) == ("org/checker", commit)
    fetched = Path(record.other_model_paths[0]) / "model.safetensors"
    assert fetched.read_bytes() == (checker / "model.safetensors").read_bytes()
    with pytest.raises(Failure, match=r"^spec\.image\.safety\.id: model org/pickled has its weights only as pytorch_"):
        prepare.main(run_with("org/pickled"))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_job_without_an_image_that_is_left_fails(job: Callable[..., Job], shards: int) -> None:
    """However its rows are divided."""
    with pytest.raises(Failure, match=r"^spec\.image\.safety: no image is left: 2 of 2 are withheld") as failure:
        job({"threshold": 1e-6, "policy": "withhold"}, ROWS[:2], shards=shards)
    assert failure.value.code is ExitCode.INVALID_DATASET


def test_images_of_images_are_checked(job: Callable[..., Job], checker: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (20, 120, 60)).save(tmp_path / "start.png")
    row = {"prompt": "a lute", "initImage": str(tmp_path / "start.png")}
    lines, _, result, _ = job({}, [row], task="image-to-image")
    expect = plain_scores(checker, list(result.rglob("*.png")))
    assert [line["unsafeScore"] for line in lines] == pytest.approx(expect, abs=1e-6)


@pytest.mark.parametrize("sealed", [1, 100], ids=["in tables", "in the journal"])
def test_an_attempt_that_resumes_counts_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: int
) -> None:
    monkeypatch.setattr(ledger, "SEGMENT", sealed)
    for attempt, found in enumerate(([True, False], [True, True])):
        shard = Shard(WorkspaceFolder(tmp_path), 0, 1, ImageEngine.records, range(4), {"task": "text-to-image"}, "here")
        shard.resume()
        assert shard.unsafe == attempt
        numbers = range(2 * attempt, 2 * attempt + 2)
        shard.append(
            [
                Output(
                    sample("a lute", row=n, number=n),
                    {"unsafe": unsafe},
                    file=lambda: b"x",
                    suffix="png",
                )
                for n, unsafe in zip(numbers, found, strict=True)
            ]
        )
    assert shard.unsafe == 3


@dataclass(frozen=True)
class Wrong:
    name: str
    message: str
    labels: list[str] = field(default_factory=lambda: UNSAFE)
    config: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path], object] = lambda folder: None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


WRONG = [
    Wrong(
        name="a label that the model lacks",
        labels=["nsfv"],
        message="spec.image.safety.labels: the model has no label 'nsfv' (its labels: normal, nsfw, gore). Did you mean"
        " 'nsfw'?",
    ),
    Wrong(
        name="all labels",
        labels=list(LABELS),
        message="spec.image.safety.labels: these are all labels of the model",
    ),
    Wrong(
        name="labels that exclude nothing",
        config={"problem_type": "multi_label_classification"},
        message="spec.image.safety: the model does not choose one of several labels",
    ),
    Wrong(
        name="pickles alone",
        change=pickled,
        message="spec.image.safety.path: {folder} holds no weights (*.safetensors); files that can run code",
    ),
    Wrong(
        name="no image processor",
        change=lambda folder: (folder / "preprocessor_config.json").unlink(),
        message="spec.image.safety: {folder} has no usable image processor",
    ),
    Wrong(
        name="images of another size than the model's",
        change=lambda folder: ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder),
        message="spec.image.safety: the model does not take what its image processor makes of an image of 32 × 32:",
    ),
    Wrong(
        name="no head",
        change=lambda folder: ViTForImageClassification.from_pretrained(folder).vit.save_pretrained(folder),
        message="spec.image.safety: {folder} (ViTModel) has no head for image-classification: it holds no",
    ),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_model_that_cannot_check_ends_in_prepare(case: Wrong, sdxl: Path, tmp_path: Path) -> None:
    folder = write_checker(tmp_path / "checker", **case.config)
    case.change(folder)
    run = generate_run(
        tmp_path / "job",
        ROWS[:1],
        task="text-to-image",
        model={"path": str(sdxl)},
        image=SMALL | {"safety": {"path": str(folder), "labels": case.labels}},
    )
    with pytest.raises(Failure) as failure:
        prepare.main(run)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert failure.value.message.startswith(case.message.format(folder=folder))
