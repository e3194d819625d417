"""The contact sheet of a dataset of images, as a browser reads it."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hub.server import Running
from huggingface_hub import HfApi
from PIL import Image
from trainer.generating import IMAGE, generate_run, prepare_by_hand, sample

from luthier_api.run import GenerateRun
from luthier_api.variables import Variables
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.exports.table import deliver
from luthier_trainer.generation.ledger import Shard
from luthier_trainer.generation.rows import span_of_shard
from luthier_trainer.generation.samples import Output
from luthier_trainer.publish import contact_sheet, model_card
from luthier_trainer.publish import main as publish
from luthier_trainer.workspace.prepared import read_prepared

HUB = {"repo": "luthier/lutes", "tokenSecretRef": {"name": "hf", "key": "token"}}
SCRIPT = "<script>alert('a')</script> & \"b\""


def picture(colour: tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (512, 128), colour).save(content, "png")
    return content.getvalue()


def image(row: int, prompt: str, **more: Any) -> Output:
    made = sample(prompt, row=row, seed=row, settings=IMAGE, number=row, **more)
    return Output(made, file=lambda: picture((200, 10 * row, 0)), suffix="png")


OUTPUTS = [
    image(0, SCRIPT, negative="<b>rain</b>", id="</p>", overrides={"steps": 9}),
    Output(sample("too long", row=1, seed=1, number=1), error="the prompt has <9> tokens more"),
    image(2, "a lute" + 1000 * "!"),
    image(3, "a harp"),
]


def finished(workspace: Path, contact: int | None = None, shards: int = 2, **spec: Any) -> GenerateRun:
    """A job of images whose outputs are there."""
    hub = HUB | ({} if contact is None else {"contactSheet": contact})
    rows = [{"prompt": output.sample.prompt} for output in OUTPUTS]
    given = {"task": "text-to-image", "model": {"path": "/models/m"}, "shards": shards, "hub": hub}
    run = generate_run(workspace, rows, **given | spec)
    prepare_by_hand(run)
    folder = WorkspaceFolder(workspace)
    settings = {"task": "text-to-image", "model": {"source": "m"}, "adapters": []}
    for index in range(shards):
        span = span_of_shard(len(OUTPUTS), shards, index)
        shard = Shard(folder, index, shards, engine_class("text-to-image").records, span, settings, "here")
        shard.resume()
        shard.append([replace(OUTPUTS[i], sample=replace(OUTPUTS[i].sample, number=i)) for i in span])
        shard.finish({"rows": len(span), "failedRows": shard.failed})
    deliver(run, read_prepared(run), folder, 0)
    return run


@dataclass
class Seen(HTMLParser):
    """What a browser makes of a page."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def seen(page: str) -> Seen:
    found = Seen()
    found.feed(page)
    found.close()
    return found


def page_of(run: GenerateRun) -> str | None:
    return contact_sheet.page(run, WorkspaceFolder(Path(run.workspace)).result)


def test_the_page_shows_the_outputs_and_loads_nothing(tmp_path: Path) -> None:
    page = page_of(finished(tmp_path))
    assert page
    found = seen(page)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "main", "figure", "img", "figcaption")
    }
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert [attributes["alt"] for attributes in images] == [SCRIPT, "a lute" + 394 * "!" + "…", "a harp"]
    assert all((attributes["src"] or "").startswith("data:image/jpeg;base64,") for attributes in images)
    thumbnails = [Image.open(io.BytesIO(base64.b64decode((a["src"] or "").partition(",")[2]))) for a in images]
    assert [thumbnail.size for thumbnail in thumbnails] == [(256, 64)] * 3
    greens = [thumbnail.getpixel((9, 9))[1] for thumbnail in thumbnails]  # type: ignore[index]
    assert greens == pytest.approx([0, 20, 30], abs=3)
    shown = [text for text in found.texts if text.strip()]
    for text in (
        SCRIPT,
        "not: <b>rain</b>",
        "row 0, id </p>, seed 0",
        '{"steps": 9}',
        "the prompt has <9> tokens more",
    ):
        assert text in shown
    assert len(page) < 4 * 20_000


@dataclass(frozen=True)
class Case:
    name: str
    figures: int
    contact: int | None = None
    spec: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(name="as many as the job wants", figures=3, contact=3),
    Case(name="archives", figures=4, spec={"outputs": {"format": "webdataset"}}),
    Case(name="Parquet", figures=4, spec={"outputs": {"format": "parquet"}}),
    Case(name="none", figures=0, contact=0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_outputs_are_shown(case: Case, tmp_path: Path) -> None:
    page = page_of(finished(tmp_path, case.contact, **case.spec))
    assert (page is None) is (case.figures == 0)
    assert (page or "").count("<figure>") == case.figures


def test_the_card_shows_images_that_are_there(tmp_path: Path) -> None:
    run = finished(tmp_path)
    result = WorkspaceFolder(tmp_path).result
    card = model_card.card(run, read_prepared(run), result)
    shown = re.findall(r"^!\[(.*)\]\((.*)\)$", card, re.MULTILINE)
    assert [alt for alt, _ in shown][::2] == ["\\<script\\>alert\\('a'\\)\\<\\/script\\> \\& \\\"b\\\"", "a harp"]
    images = [Image.open(result / path).getpixel((0, 0)) for _, path in shown]
    assert images == [(200, 10 * row, 0) for row in (0, 2, 3)]


def test_half_a_character_costs_no_page() -> None:
    line = {"row": 0, "sample": 0, "id": None, "seed": 7, "prompt": "a lute \ud800", "error": "too long"}
    assert "<p>a lute ?</p>" in contact_sheet.figure(line, None)


def test_a_thumbnail_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    run = finished(tmp_path)
    first = min((tmp_path / "result").rglob("*.png"))
    first.write_bytes(b"no image")
    page = page_of(run) or ""
    assert "cannot be shown: UnidentifiedImageError" in page
    assert page.count("<img ") == 2


def test_the_page_is_published_and_goes_with_its_switch(
    tmp_path: Path, hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Variables.TOKEN, "hf_writer")
    api = HfApi(endpoint=hub.url, token="hf_writer")
    publish.main(finished(tmp_path / "with"))
    repo = {"repo_id": "luthier/lutes", "repo_type": "dataset"}
    page = api.hf_hub_download(**repo, filename=contact_sheet.FILE, local_dir=tmp_path / "copy")
    assert SCRIPT in seen(Path(page).read_text()).texts

    publish.main(finished(tmp_path / "without", contact=0))
    assert contact_sheet.FILE not in api.list_repo_files(**repo)
