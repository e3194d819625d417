"""reward: learn to rate answers, from pairs of which one is better (Bradley-Terry), with TRL's RewardTrainer.

The reward is the one output of a head on the last token of prompt and answer. The result is a model for sequence
classification, which GRPO and `AutoModelForSequenceClassification` load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import columns, pair_tokens, pairs, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.pairs import ANSWERS, PAIR
from luthier_trainer.models import embedding, inspect
from luthier_trainer.tasks.answers import AnswersTask
from luthier_trainer.tasks.base import LoadedModel, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.headed import HeadedTask
from luthier_trainer.tasks.texts import ADD_ROWS, check_ends

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

    from luthier_trainer.models.memory import Trial

ENCODED = ("chosen_ids", "rejected_ids")  # the names in TRL, which drops columns with other names
OUTPUT = "reward"  # the name of the head's one number in the result's configuration


class RewardTask(HeadedTask, AnswersTask):
    """The task reward."""

    task = "reward"

    def outputs(self, labels: list[str] | None) -> list[str]:
        return [OUTPUT]

    # ---- prepare

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return pairs.wanted(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return pairs.read(rows, spec)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        check_ends(model.processor)
        super().check_model(model, spec, rows, labels)

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        """Return the token ids of each answer with its prompt.

        Pairs with an answer of more than `spec.training.maxLength` tokens are left out, as in TRL: the head reads the
        last token of an answer, and would learn to rate the beginning of a text.
        """
        longest = spec.training.max_length

        def read(row: pairs.Pair, parts: pair_tokens.Parts) -> tuple[dict[str, Any], tuple[str, ...]]:
            fits = not parts.failure and parts.length <= longest
            answers = [parts.prompt + answer for answer in parts.answers] if fits else [[], []]
            cells = dict(zip(ENCODED, answers, strict=True)) | {"length": parts.length if fits else 0}
            return cells, () if fits or parts.failure else ("long",)

        split = pair_tokens.splitter(rows, PAIR, processor, spec, use)
        return pair_tokens.encoded(rows, PAIR, split, ANSWERS, read, pair_tokens.token_lists(ENCODED), longest, use)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        return pairs.joined(rows.data, PAIR)

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        """Check that each split has pairs, and that the model knows their tokens. Raises Failure if not."""
        for name, rows in data.items():
            if len(rows) == 0:
                raise columns.invalid(f"{tokens.MAX_LENGTH}: all pairs of the {name} split are longer; set it higher")
        embedding.check_rows(model.missing_tokens, data, model.processor, inspect.MODEL, ADD_ROWS, ENCODED)
        embedding.notice_absent(model.new_tokens, data, model.processor, ENCODED)

    def count_tokens(self, data: Dataset) -> int:
        """Return the number of tokens in both sequences of each pair; a prompt counts twice."""
        return sum(len(ids) for name in ENCODED for ids in data[name])

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        from luthier_trainer.tasks import trl_steps

        return trl_steps.of_rewards(model, self.task, spec, rows)

    # ---- training

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        from trl import RewardConfig

        return RewardConfig(
            **common,
            center_rewards_coefficient=spec.reward.center_rewards_coefficient,
            disable_dropout=False,  # `OverRanks` does it, and leaves that of adapters
            max_length=None,  # `encode` has left out pairs that are too long
            gradient_checkpointing=False,  # `common` sets it under the name that transformers uses
        )

    def load_model(self, context: TrainingContext) -> LoadedModel:
        loaded = super().load_model(context)
        # Decoders rate by the last token that is not padding, so they need the id of the padding token.
        loaded.model.config.pad_token_id = context.processor.pad_token_id
        return loaded

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from trl.trainer.reward_trainer import DataCollatorForPreference

        collator = DataCollatorForPreference(context.processor.pad_token_id)
        return TrainerSetup(trainer_class(), collator, {"compute_metrics": RewardMetrics()})


@cache
def trainer_class() -> type:
    """Return a subclass of TRL's trainer that computes exact evaluation metrics.

    This is a function so that TRL and torch are imported only when they are needed.
    """
    import torch
    from torch.nn.functional import logsigmoid
    from trl import RewardTrainer as Base

    from luthier_trainer.tasks.trl_trainer import OverRanks

    class RewardTrainer(OverRanks, Base):
        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
            """Return the mean loss, and loss and both rewards of each pair, double [pairs, 3].

            TRL's own metrics are means over a batch that include the rows which fill it up. The third value is a
            placeholder for labels, because transformers computes metrics only if there are labels.
            """
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                rewards = model(**inputs, use_cache=False).logits.squeeze(-1).float()
            chosen, rejected = rewards.chunk(2)
            loss = -logsigmoid(chosen - rejected)
            if self.args.center_rewards_coefficient is not None:
                loss = loss + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
            pairs = torch.stack([loss, chosen, rejected], dim=1).double()
            return loss.mean(), pairs, torch.zeros(len(pairs), device=pairs.device)

    return RewardTrainer


class RewardMetrics:
    """Computes evalLoss, rewardAccuracy and rewardMargin over all held-out pairs, and the spread of their rewards."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        import torch

        self.rows.append(gathered.predictions)
        if not compute_result:
            return {}
        rows, self.rows = torch.cat(self.rows), []
        loss, chosen, rejected = rows.unbind(dim=1)
        both = rows[:, 1:]
        return {
            "loss": loss.mean().item(),
            "rewardAccuracy": (chosen > rejected).double().mean().item(),
            "rewardMargin": (chosen - rejected).mean().item(),
            "rewardMean": both.mean().item(),
            "rewardMin": both.min().item(),
            "rewardMax": both.max().item(),
        }
