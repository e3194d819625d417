"""Audio that tests make, and models small enough for one core that hear it: tones of three heights, over noise."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import soundfile
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoModelForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

RATE = 16_000
HEIGHTS = {"low": 300.0, "middle": 900.0, "high": 2700.0}
"""Class → Hz."""
SECONDS = 0.3
WAV2VEC2 = Wav2Vec2Config(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    conv_dim=(16, 16),
    conv_kernel=(20, 8),
    conv_stride=(16, 8),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=16,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    conv_bias=True,
    mask_time_length=4,
    layerdrop=0.5,  # so that each test would see it
    initializer_range=0.1,  # 0.02 is for hundreds of dimensions
)
WHISPER = WhisperConfig(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    num_mel_bins=16,
    max_source_positions=50,
    classifier_proj_size=16,
    init_std=0.1,
)
"""It hears one second."""
AST = ASTConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_length=64,
    num_mel_bins=32,
    frequency_stride=16,
    time_stride=16,
    initializer_range=0.1,
)
EXTRACTORS = {
    "wav2vec2": lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "whisper": lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    "audio-spectrogram-transformer": lambda: ASTFeatureExtractor(max_length=64, num_mel_bins=32),
}


def tone(hertz: float, seconds: float = SECONDS, rate: int = RATE, noise: float = 0.0, seed: int = 0) -> numpy.ndarray:
    """A tone of half the greatest volume, float32 [samples]."""
    time = numpy.arange(round(seconds * rate)) / rate
    drawn = numpy.random.default_rng(seed).normal(size=len(time)) * noise
    return (0.5 * numpy.sin(2 * numpy.pi * hertz * time) + drawn).astype("float32")


def file_of(samples: numpy.ndarray, rate: int = RATE, kind: str = "WAV") -> bytes:
    """An audio file of this kind. `samples`: [samples] or [samples, channels]."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def write_tones(folder: Path, each: int = 20, classes: Sequence[str] = tuple(HEIGHTS), seed: int = 0) -> Path:
    """`each` clips of each class, of several lengths, and the table `tones.jsonl` of their paths; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(seed)
    lines = []
    for i in range(each):
        for label in classes:
            name = f"{label}-{i}.wav"
            hertz, seconds = HEIGHTS[label] * random.uniform(0.9, 1.1), random.uniform(0.25, 0.4)
            (folder / name).write_bytes(file_of(tone(hertz, seconds, noise=0.05, seed=len(lines))))
            lines.append(json.dumps({"audio": name, "label": label}) + "\n")
    (folder / "tones.jsonl").write_text("".join(lines))
    return folder / "tones.jsonl"


def save_model(folder: Path, config: Any = WAV2VEC2, seed: int = 1) -> Path:
    """A model with new weights, and its feature extractor."""
    torch.manual_seed(seed)
    AutoModelForAudioClassification.from_config(config).save_pretrained(folder)
    EXTRACTORS[config.model_type]().save_pretrained(folder)
    return folder
