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
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoModelForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

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


LANGUAGES_OF = 3  # languages that the small Whisper knows, of those that its tokenizer names
SPEECH: dict[str, Any] = {
    **WHISPER.to_dict(),
    "max_target_positions": 48,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WORDS = {"low": "low tone", "middle": "middle", "high": "a high tone"}
"""Class → what is said."""


def speech_tokenizer() -> WhisperTokenizer:
    """One token a byte, and Whisper's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}, merges=[])
    names = ["startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev", "nocaptions"]
    names += ["notimestamps"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", special=False) for i in range(51)])
    tokenizer.set_prefix_tokens()
    return tokenizer


def save_speech_model(folder: Path, multilingual: bool = True, seed: int = 1) -> Path:
    """A Whisper with new weights, which hears one second, and its processor."""
    tokenizer = speech_tokenizer()
    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(**SPEECH | ids | {"vocab_size": len(tokenizer)})
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    settings = model.generation_config
    settings.update(**ids, max_length=48)
    settings._from_model_config = False  # such settings would be read without those of Whisper
    settings.is_multilingual = multilingual
    settings.no_timestamps_token_id = tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    if multilingual:
        known = [f"<|{code}|>" for code in [*LANGUAGES][:LANGUAGES_OF]]
        settings.lang_to_id = dict(zip(known, tokenizer.convert_tokens_to_ids(known), strict=True))
        settings.task_to_id = {task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in TASK_IDS}
    model.save_pretrained(folder)
    WhisperProcessor(EXTRACTORS["whisper"](), tokenizer).save_pretrained(folder)
    return folder


def write_speech(folder: Path, each: int = 12, classes: Sequence[str] = tuple(HEIGHTS)) -> Path:
    """Clips of tones, and the table `speech.jsonl` of their paths and of what is said; returns the table."""
    table = write_tones(folder, each, classes)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    lines = [json.dumps({"audio": row["audio"], "text": WORDS[row["label"]]}) + "\n" for row in rows]
    (folder / "speech.jsonl").write_text("".join(lines))
    return folder / "speech.jsonl"
