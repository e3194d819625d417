"""The rewards of the task grpo: functions from completions to numbers, one for each row of `luthier_api.rewards`.

A function is called as TRL calls its own: with the texts of prompts and completions, the tokens of completions, and the
columns of their rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.grpo import RewardFunction
from luthier_api.rewards import RewardType
from luthier_trainer.data.masks import ChatReader
from luthier_trainer.data.reading import Reader
from luthier_trainer.models import inspect, processors
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ROWS_AT_ONCE = 8  # of a reward model


@dataclass(frozen=True)
class Completions:
    """What models write for prompts, one entry a completion."""

    prompts: Sequence[str]
    """Texts, or JSON texts of messages."""
    texts: Sequence[str]
    """Without control tokens."""
    tokens: Sequence[int]
    """Tokens of each completion, with its end-of-text token."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Columns of the dataset that rewards read → their cells."""
    messages: bool = False
    """Whether prompts are messages."""
    ids: Sequence[Sequence[int]] = ()
    """The tokens themselves."""


Rate = Callable[[Completions], Sequence[float]]


def named(spec: FineTuneJobSpec) -> dict[str, RewardFunction]:
    """Return name → reward, in the order of the spec: the type, with a number if it comes more than once."""
    seen: Counter[str] = Counter()
    found = {}
    for reward in spec.grpo.rewards:
        seen[reward.type] += 1
        number = seen[reward.type]
        found[reward.type if number == 1 else f"{reward.type}{number}"] = reward
    return found


def check_patterns(spec: FineTuneJobSpec) -> None:
    """Raise Failure if the pattern of a reward is no regular expression, or lacks the group that is compared."""
    for i, reward in enumerate(spec.grpo.rewards):
        if reward.pattern is None:
            continue
        where = f"spec.grpo.rewards[{i}].pattern"
        try:
            compiled = re.compile(reward.pattern)
        except re.error as error:
            raise Failure(
                ExitCode.INVALID_SPEC, f"{where}: {reward.pattern} is not a regular expression of Python: {error}"
            ) from None
        if reward.type == "exactMatch" and not compiled.groups:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{where}: {reward.pattern} has no group; put parentheses around the part that is the answer",
            )


def exact_match(reward: RewardFunction) -> Rate:
    """Return the reward 1 for completions that are the text of their row."""
    pattern, column = reward.pattern and re.compile(reward.pattern), str(reward.column)

    def answer(text: str) -> str | None:
        if not pattern:
            return text.strip()
        found = list(pattern.finditer(text))
        return (found[-1][1] or "").strip() if found else None

    def rate(given: Completions) -> list[float]:
        wanted = given.columns[column]
        return [float(answer(text) == str(right).strip()) for text, right in zip(given.texts, wanted, strict=True)]

    return rate


def regex(reward: RewardFunction) -> Rate:
    """Return the reward 1 for completions in which the pattern is found."""
    pattern = re.compile(str(reward.pattern))
    return lambda given: [float(pattern.search(text) is not None) for text in given.texts]


def length(reward: RewardFunction) -> Rate:
    """Return the reward 1 for completions of the wanted length, which falls to 0 with the distance from it."""
    wanted = reward.tokens or 1

    def rate(given: Completions) -> list[float]:
        away = [tokens - wanted for tokens in given.tokens]
        if reward.shorter:
            away = [max(distance, 0) for distance in away]
        return [max(1 - abs(distance) / wanted, 0.0) for distance in away]

    return rate


def valid_json(reward: RewardFunction) -> Rate:
    """Return the reward 1 for completions that are JSON, with the wanted keys if there are any."""

    def is_valid(text: str) -> bool:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return reward.keys is None or (isinstance(value, dict) and set(reward.keys) <= value.keys())

    return lambda given: [float(is_valid(text)) for text in given.texts]


FUNCTIONS: Mapping[RewardType, Callable[[RewardFunction], Rate]] = {
    "exactMatch": exact_match,
    "regex": regex,
    "length": length,
    "json": valid_json,
}
"""The rewards that are computed from a completion alone."""


@dataclass
class RatedByModel:
    """The reward type `model`: the one output of a model for sequence classification.

    Prompt and completion are written as the task reward writes them: joined, with the end-of-text token, or by the chat
    template of the reward model's tokenizer.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    longest: int | None
    """Positions of the model; None: without a limit."""
    _chats: ChatReader = field(init=False)
    _texts: Reader = field(init=False)

    def __post_init__(self) -> None:
        self._chats, self._texts = ChatReader(self.tokenizer, "all"), Reader(self.tokenizer)

    def __call__(self, given: Completions) -> list[float]:
        rows = [self.ids(prompt, text, given.messages) for prompt, text in zip(given.prompts, given.texts, strict=True)]
        if self.longest and any(len(row) > self.longest for row in rows):
            notice(
                f"spec.grpo.rewards: some completions with their prompts are longer than the {self.longest} positions"
                " of a reward model, which rates their ends alone; lower training.maxLength"
            )
            rows = [row[-self.longest :] for row in rows]
        parts = (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))
        return [reward for part in parts for reward in self.rate(part)]

    def ids(self, prompt: str, completion: str, messages: bool) -> list[int]:
        """Return the tokens that are rated."""
        if messages:
            answer = {"role": "assistant", "content": completion}
            return self._chats({"messages": [*json.loads(prompt), answer]}).ids
        return self._texts.row(self._texts([prompt + completion])["input_ids"][0])

    def rate(self, rows: list[list[int]]) -> list[float]:
        """Return the rewards of rows of tokens."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        device = next(self.model.parameters()).device
        ids = [torch.tensor(row) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        padded = pad_sequence(ids, batch_first=True, padding_value=self.model.config.pad_token_id)
        with torch.inference_mode():
            outputs = self.model(input_ids=padded.to(device), attention_mask=mask.to(device))
        return [float(reward) for reward in outputs.logits[:, 0].float()]


def check_model(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, messages: bool, where: str) -> None:
    """Raise Failure if a model does not answer with one number, or cannot read conversations although it has to."""
    from transformers import AutoModelForSequenceClassification

    made_for = (getattr(config, "architectures", None) or [""])[0]
    if type(config) not in AutoModelForSequenceClassification._model_mapping or config.num_labels != 1:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{where}: {made_for or config.model_type} with {config.num_labels} outputs is no reward model, which has a"
            " head for sequence classification with one output. Train one with task: reward",
        )
    if not made_for.endswith("ForSequenceClassification"):
        raise Failure(
            ExitCode.INVALID_SPEC, f"{where}: {made_for} has no head for a reward. Train one with task: reward"
        )
    if messages and not tokenizer.chat_template:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{where}: prompts are messages, and the tokenizer of the reward model has no chat template. Train the"
            " reward model on messages, too",
        )


def load_model(folder: Path, device: torch.device) -> RatedByModel:
    """Return a reward model, frozen and on `device`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).to(device)
    tokenizer = processors.read_tokenizer(folder, "spec.grpo.rewards")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return RatedByModel(model.eval().requires_grad_(False), tokenizer, inspect.max_positions(model.config))
