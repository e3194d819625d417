"""The engine of each task of a GenerateJob. They are imported only when used, because each imports large libraries."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from luthier_api.tasks import GenerateTask

if TYPE_CHECKING:
    from luthier_trainer.generation.engines.base import Engine

ENGINES: Mapping[GenerateTask, tuple[str, str]] = {
    "text-classification": ("luthier_trainer.generation.engines.classification", "ClassificationEngine"),
    "token-classification": ("luthier_trainer.generation.engines.tokens", "TokenEngine"),
    "question-answering": ("luthier_trainer.generation.engines.spans", "SpanEngine"),
    "zero-shot-classification": ("luthier_trainer.generation.engines.zeroshot", "ZeroShotEngine"),
    "fill-mask": ("luthier_trainer.generation.engines.masks", "MaskEngine"),
    "feature-extraction": ("luthier_trainer.generation.engines.embedding", "EmbeddingEngine"),
    "text-generation": ("luthier_trainer.generation.engines.text", "TextEngine"),
    "summarization": ("luthier_trainer.generation.engines.seq2seq", "Seq2SeqEngine"),
    "translation": ("luthier_trainer.generation.engines.seq2seq", "Seq2SeqEngine"),
    "text2text-generation": ("luthier_trainer.generation.engines.seq2seq", "Seq2SeqEngine"),
    "image-classification": ("luthier_trainer.generation.engines.image_classification", "ImageClassificationEngine"),
    "image-to-text": ("luthier_trainer.generation.engines.captions", "CaptionEngine"),
    "image-to-image": ("luthier_trainer.generation.engines.image_to_image", "ImageToImageEngine"),
    "automatic-speech-recognition": ("luthier_trainer.generation.engines.speech", "SpeechEngine"),
    "text-to-image": ("luthier_trainer.generation.engines.images", "ImageEngine"),
}
"""Task → module and name of the class."""


def engine_class(task: GenerateTask) -> type[Engine]:
    """Return the engine class of a task."""
    module, name = ENGINES[task]
    found: type[Engine] = getattr(import_module(module), name)
    return found
