"""What is copied along with a model beside its weights."""

from __future__ import annotations

from pathlib import Path

from luthier_trainer.workspace.model_files import copy_text_files

COPIED = ("tokenizer.json", "vocab.txt", "tokenizer.model", "chat_template.jinja", "cl100k_base.tiktoken")
LEFT = (
    "adapter_config.json",
    "MANIFEST.json",
    "metrics.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors.index.json",
)


def test_tokenizer_and_templates_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in (*COPIED, *LEFT, "config.json"):
        (source / name).write_text("source")
    (target / "config.json").write_text("target")

    copy_text_files(source, target)

    assert {file.name for file in target.iterdir()} == {*COPIED, "config.json"}
    assert (target / "config.json").read_text() == "target", "what is there already stays"
