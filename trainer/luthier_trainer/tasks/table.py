"""The implementations of the tasks of a FineTuneJob, by name. `luthier_api.tasks` defines which tasks exist."""

from __future__ import annotations

from collections.abc import Mapping

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.tasks.audio_classification import AudioClassification
from luthier_trainer.tasks.base import Task
from luthier_trainer.tasks.causal_lm import CausalLM
from luthier_trainer.tasks.embedding import EmbeddingTask
from luthier_trainer.tasks.grpo import Grpo
from luthier_trainer.tasks.image_classification import ImageClassification
from luthier_trainer.tasks.masked_lm import MaskedLM
from luthier_trainer.tasks.preference import PreferenceTask
from luthier_trainer.tasks.question_answering import QuestionAnswering
from luthier_trainer.tasks.reward import RewardTask
from luthier_trainer.tasks.seq2seq import Seq2Seq
from luthier_trainer.tasks.speech_recognition import SpeechRecognition
from luthier_trainer.tasks.text_classification import TextClassification
from luthier_trainer.tasks.text_to_image import TextToImage
from luthier_trainer.tasks.token_classification import TokenClassification

TASKS: Mapping[str, Task] = {
    "causal-lm": CausalLM(),
    "seq2seq": Seq2Seq(),
    "preference": PreferenceTask(),
    "reward": RewardTask(),
    "grpo": Grpo(),
    "text-classification": TextClassification(),
    "token-classification": TokenClassification(),
    "question-answering": QuestionAnswering(),
    "masked-lm": MaskedLM(),
    "embedding": EmbeddingTask(),
    "image-classification": ImageClassification(),
    "text-to-image": TextToImage(),
    "audio-classification": AudioClassification(),
    "speech-recognition": SpeechRecognition(),
}


def task_of(spec: FineTuneJobSpec) -> Task:
    """Return the implementation of a job's task."""
    return TASKS[spec.task]
