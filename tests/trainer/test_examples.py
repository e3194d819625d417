"""`luthier run` with the real trainer: manifests of the examples, made short, on small models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionXLPipeline
from hub.server import Running
from huggingface_hub import HfApi
from PIL import Image
from prepared_workspace import losses
from pyarrow import parquet
from trainer.one_process import luthier_run
from trainer.small_sdxl import write_small_sdxl
from transformers import AutoTokenizer

from luthier_api.run import FineTuneRun, read_run
from luthier_api.spec import Hub, SecretKey
from luthier_api.variables import Variables
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish import main as publish
from luthier_trainer.training import main as train
from trainer import tones

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT: dict[str, dict[str, Any]] = {
    "finetune-sdxl.yaml": {
        "model": {"path": "/data/sdxl"},
        "image": {"resolution": 32, "bucketStep": 8, "cacheEncodings": True, "minSnrGamma": 5},
        "training": {"maxSteps": 4, "batchSize": 4, "saveSteps": 2, "learningRate": 1e-2, "logSteps": 1},
        "resources": {"gpusPerNode": 0, "processesPerNode": 2},
    },
    "generate-sdxl-style.yaml": {
        "model": {"path": "/data/sdxl"},
        "image": {"steps": 2, "width": 32, "height": 32},
        "resources": {"gpus": 0},
    },
}


def test_a_style_is_learnt_drawn_and_published(tmp_path: Path, hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_sdxl(tmp_path / "data/sdxl")
    lutes = tmp_path / "data/lutes"
    lutes.mkdir()
    lines = []
    for i in range(10):
        Image.new("RGB", (40, 32 + i), (20 * i, 90, 120)).save(lutes / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a lute on bench {i}"}))
    (lutes / "metadata.jsonl").write_text("\n".join(lines))
    for name, changes in SHORT.items():
        document = yaml.safe_load((EXAMPLES / name).read_text())
        (tmp_path / name).write_text(yaml.safe_dump(document | {"spec": document["spec"] | changes}))

    style, drawn = luthier_run(tmp_path, *SHORT)
    assert {"steps", "evalLoss", "evalLossBefore"} <= style["metrics"].keys()
    assert (tmp_path / "luthier-runs/lute-style/result/pytorch_lora_weights.safetensors").exists()
    assert len(list(Path(drawn["result"]).rglob("*.png"))) == 2

    # Noise belongs to rows: one process alone learns the same, but for rounding.
    spec = yaml.safe_load((tmp_path / "finetune-sdxl.yaml").read_text())["spec"]
    spec |= {"model": {"path": str(tmp_path / "data/sdxl")}, "resources": {"gpusPerNode": 0}, "volumes": []}
    spec["dataset"] |= {"files": [str(lutes)]}
    alone, shared = (
        FineTuneRun.model_validate({"name": "style", "workspace": str(folder), "metricsPort": 0, "spec": spec})
        for folder in (tmp_path / "alone", tmp_path / "luthier-runs/lute-style")
    )
    prepare.main(alone)
    train.main(alone)
    assert losses(alone) == pytest.approx(losses(shared), rel=1e-4)

    # The result reaches the Hub, where diffusers loads it.
    monkeypatch.setenv(Variables.TOKEN, "hf_writer")
    learnt = read_run((tmp_path / "luthier-runs/lute-style/run.json").read_bytes())
    target = Hub(repo="luthier/lute-style", token_secret_ref=SecretKey(name="hf"))
    status = publish.main(learnt.model_copy(update={"spec": learnt.spec.model_copy(update={"hub": target})})).hub
    assert status is not None
    copy = HfApi(endpoint=hub.url, token="hf_writer").snapshot_download(status.repo, local_dir=tmp_path / "copy")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "data/sdxl")
    pipeline.load_lora_weights(copy)
    assert pipeline.get_active_adapters() == ["default_0"]


CHAT_SHORT: dict[str, Any] = {"maxSteps": 2, "batchSize": 4, "maxLength": 64, "logSteps": 1}
CHAIN: dict[str, dict[str, Any]] = {
    "finetune-chat.yaml": {
        "model": {"path": "/data/model"},
        "dataset": {"files": ["/data/conversations.jsonl"], "chatTemplate": {"name": "zephyr"}},
        "training": CHAT_SHORT,
        "resources": {"gpusPerNode": 0},
    },
    "finetune-preference.yaml": {
        "training": CHAT_SHORT | {"learningRate": 3e-3, "maxSteps": 6},
        "resources": {"gpusPerNode": 0},
    },
}


def test_a_chat_model_learns_to_prefer(tmp_path: Path, tiny_model: Path, pairs: list[dict[str, str]]) -> None:
    """The template of the first job is that of the second, whose reference is the first one's result."""
    data = tmp_path / "data"
    shutil.copytree(tiny_model, data / "model")
    turn = {role: [{"role": speaker}] for role, speaker in (("prompt", "user"), ("chosen", "assistant"))}
    rows = [{role: [message | {"content": pair[role]}] for role, (message,) in turn.items()} for pair in pairs]
    chats = [{"messages": row["prompt"] + row["chosen"]} for row in rows]
    for row, pair in zip(rows, pairs, strict=True):
        row["rejected"] = [{"role": "assistant", "content": pair["rejected"]}]
    for name, lines in (("conversations", chats), ("pairs", rows)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, changes in CHAIN.items():
        document = yaml.safe_load((EXAMPLES / name).read_text())
        (tmp_path / name).write_text(yaml.safe_dump(document | {"spec": document["spec"] | changes}))

    _, preferred = luthier_run(tmp_path, *CHAIN)
    assert preferred["metrics"]["evalLossBefore"] == pytest.approx(math.log(2), abs=1e-4)
    assert preferred["metrics"]["lastLoss"] < math.log(2)
    assert {"rewardAccuracy", "rewardMargin", "rewardChosen", "rewardRejected"} <= preferred["metrics"].keys()
    log = (tmp_path / "luthier-runs/support-manners/logs/prepare.log").read_text()
    assert "The chosen answer of the first training row" in log
    assert "<|assistant|>\n⟦" in log


FORMS: dict[str, dict[str, Any]] = {
    "generate-chain.yaml": {"model": {"path": "/data/model"}, "batchSize": 2},
    "generate-openai-batch.yaml": {"model": {"path": "/data/model"}, "batchSize": 2},
    "generate-parquet.yaml": {"model": {"path": "/data/model"}, "batchSize": 2},
}
SHORT_TEXTS = {"maxNewTokens": 4}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_texts_go_from_job_to_job_and_in_and_out_in_other_forms(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_model, data / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(data / "model")
    asked = {"method": "POST", "url": "/v1/chat/completions"}
    messages = [{"role": "user", "content": "What is a lute?"}]
    files: dict[str, list[dict[str, Any]]] = {
        "beginnings": [{"beginning": "A lute is"}, {"beginning": "Some"}],
        "requests": [asked | {"custom_id": "one", "body": {"messages": messages, "max_tokens": 3}}],
        "questions": [{"question": "Is it warm?", "tools": [TOOL]}, {"question": "And here?", "tools": "no tools"}],
    }
    for name, rows in files.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, changes in FORMS.items():
        documents = list(yaml.safe_load_all((EXAMPLES / name).read_text()))
        for document in documents:
            document["spec"] |= changes | {"resources": {"gpus": 0}}
            document["spec"]["text"] |= SHORT_TEXTS
        (tmp_path / name).write_text(yaml.safe_dump_all(documents))

    tales, summaries, answers, calls = (Path(job["result"]) for job in luthier_run(tmp_path, *FORMS))
    told, summed = (
        list(map(json.loads, (folder / "shard-00000-of-00001.jsonl").read_text().splitlines()))
        for folder in (tales, summaries)
    )
    assert [line["prompt"] for line in summed] == [
        f"<user>Summarise this tale in one sentence: {line['text']}<assistant>" for line in told
    ]
    (answer,) = map(json.loads, (answers / "data/batch_output.jsonl").read_text().splitlines())
    assert answer["custom_id"] == "one"
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 3
    first, second = parquet.read_table(calls / "data").to_pylist()
    assert first["prompt"].startswith('[{"type": "function", "function": {"name": "weather"')
    assert (first["error"], second["finishReason"]) == (None, "error")
    assert second["error"].startswith('tools: column "tools": "no tools" is no list of JSON schemas')


CLIPS: dict[str, Any] = {
    "model": {"path": "/data/whisper"},
    "training": {"maxSteps": 60, "batchSize": 12, "learningRate": 1e-2, "logSteps": 20},
    "resources": {"gpusPerNode": 0},
    "volumes": [],
}
SPEECH: dict[str, Any] = {
    "model": {"path": "/data/whisper"},
    "training": {"maxSteps": 6, "maxLength": 32, "batchSize": 12, "learningRate": 1e-2, "metric": "wer"}
    | {"loadBestModel": True, "evalSteps": 3, "saveSteps": 3},
    "resources": {"gpusPerNode": 0},
    "volumes": [],
}


def written_table(table: Path, header: str, key: str) -> None:
    """The rows of a table of clips, as a CSV file that is called as its folder."""
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    lines = [header, *(f"{row['audio']},{row[key]}" for row in rows)]
    (table.parent / f"{table.parent.name}.csv").write_text("\n".join(lines) + "\n")


def metrics_of(tmp_path: Path, name: str, changes: dict[str, Any]) -> dict[str, float]:
    """What an example measures that was run with these fields, on the folder data."""
    document = yaml.safe_load((EXAMPLES / name).read_text())
    (tmp_path / name).write_text(yaml.safe_dump(document | {"spec": document["spec"] | changes}))
    (job,) = luthier_run(tmp_path, name)
    metrics: dict[str, float] = job["metrics"]
    return metrics


def test_clips_are_learnt(tmp_path: Path) -> None:
    """The table of the example names files that lie beside it. A small model tells three tones apart."""
    tones.save_model(tmp_path / "data/whisper", tones.WHISPER)
    written_table(tones.write_tones(tmp_path / "data/calls"), "file,intent", "label")
    metrics = metrics_of(tmp_path, "finetune-audio.yaml", CLIPS)
    assert metrics["accuracy"] > 0.8 > 0.5 > metrics["majorityShare"]


def test_speech_is_learnt(tmp_path: Path) -> None:
    """A few steps only; `tasks/test_speech.py` learns to the end."""
    tones.save_speech_model(tmp_path / "data/whisper")
    written_table(tones.write_speech(tmp_path / "data/dictation"), "file,transcript", "text")
    metrics = metrics_of(tmp_path, "finetune-speech.yaml", SPEECH)
    assert metrics["evalLoss"] < metrics["evalLossBefore"]
    assert {"wer", "cer"} <= metrics.keys()
