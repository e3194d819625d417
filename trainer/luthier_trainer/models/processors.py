"""Reads tokenizers, image processors and feature extractors from the folder of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_trainer.models import sentencepieces
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin


def read_image_processor(folder: Path, field: str) -> BaseImageProcessor:
    """Return the image processor in `folder`, in its version for Pillow even if torchvision is installed.

    The two versions round differently, and a model learns from the exact pixels, so the result must not depend on what
    is installed. Raises Failure if there is no usable image processor.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
    except Exception as error:  # each processor's class fails in its own way
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {folder} has no usable image processor (preprocessor_config.json):"
            f" {' '.join(str(error).split())[:300]}",
        ) from error


def read_feature_extractor(folder: Path, field: str) -> FeatureExtractionMixin:
    """Return the feature extractor in `folder`, which makes inputs of audio. Raises Failure if there is none."""
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each extractor's class fails in its own way
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {folder} has no usable feature extractor (preprocessor_config.json):"
            f" {' '.join(str(error).split())[:300]}",
        ) from error


def read_speech_processor(folder: Path, field: str) -> ProcessorMixin:
    """Return the feature extractor and the tokenizer in `folder`, together. Raises Failure if one is missing."""
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(processor, ProcessorMixin):
            raise TypeError(f"it is a {type(processor).__name__} alone")
    except Exception as error:  # each processor's class fails in its own way
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {folder} has no usable feature extractor and tokenizer: {' '.join(str(error).split())[:300]}",
        ) from error
    return processor


def read_tokenizer(folder: Path, field: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`. If it has no padding token, it pads with its end-of-text token.

    This hides no real token from the loss, because masks are built by position. Raises Failure if there is no usable
    tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way on missing files
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: {folder} has no usable tokenizer: {' '.join(str(error).split())[:300]}"
        ) from error
    sentencepieces.report_differences(folder, tokenizer, field)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def for_words(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `folder` so that it reads a word in a list as it reads it after a blank.

    Tokenizers of bytes (GPT-2, RoBERTa) tell both apart, and by default read no lists. The setting is saved in the
    result.
    """
    from transformers import AutoTokenizer

    if getattr(tokenizer, "add_prefix_space", None) is not False:
        return tokenizer
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, add_prefix_space=True)
    again.pad_token = tokenizer.pad_token
    return again
