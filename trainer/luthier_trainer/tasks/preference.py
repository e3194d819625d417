"""preference: learn from pairs of answers which one is better (DPO), or from answers that are good or bad (KTO).

The reward of an answer is the increase of its log-probability over the reference, which is the model that the training
started from. With an adapter, the reference is the base model without it; otherwise it is a second, frozen copy, or
what the model said of all rows before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import columns, pair_tokens, pairs, rated, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.models import embedding, inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.answers import AnswersTask
from luthier_trainer.tasks.base import Alike, LoadedModel, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.texts import ADD_ROWS, check_ends, refuse_adapter_on_head
from luthier_trainer.workspace.plan import micro_batch

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from luthier_trainer.models.memory import Trial


class PreferenceTask(AnswersTask):
    """The task preference."""

    task = "preference"

    # ---- prepare

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return way(spec).columns(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return way(spec).fitting(rows, spec)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check tokenizer, model and target modules. Raises Failure if one does not fit."""
        check_ends(model.processor)
        super().check_model(model, spec, rows, labels)
        way(spec).check(spec)
        refuse_adapter_on_head(model, spec, self.task)

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        return way(spec).encode(rows, processor, spec, use)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        return pairs.joined(rows.data, way(spec).column)

    def alike(self, rows: Rows, spec: FineTuneJobSpec) -> Alike:
        return way(spec).alike(rows, self.contents(rows, spec))

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        """Check that each split has pairs and that the model knows their tokens. Raises Failure if not."""
        for name, rows in data.items():
            if len(rows) == 0:
                raise columns.invalid(
                    f"{tokens.MAX_LENGTH}: no prompt of the {name} split leaves room for an answer; set it higher"
                )
        encoded = _encoded(data["train"])
        embedding.check_rows(model.missing_tokens, data, model.processor, inspect.MODEL, ADD_ROWS, encoded)
        embedding.notice_absent(model.new_tokens, data, model.processor, encoded)

    def count_tokens(self, data: Dataset) -> int:
        """Return the number of tokens in all sequences; the prompt of a pair counts twice."""
        prompt, *answers = _encoded(data)
        return len(answers) * _tokens(data, prompt) + sum(_tokens(data, answer) for answer in answers)

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        return way(spec).trial(model, self.task, spec, rows)

    def references(self, spec: FineTuneJobSpec) -> int:
        return 0 if spec.preference.precompute_reference else 1

    # ---- training

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        # `common` sets gradient checkpointing under the name that transformers uses, and `encode` has cut the answers.
        # `OverRanks` disables dropout, and leaves that of adapters.
        ours = {"max_length": None, "gradient_checkpointing": False, "disable_dropout": False}
        return way(spec).arguments(spec, {**common, **ours})

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForCausalLM

        return LoadedModel(AutoModelForCausalLM.from_pretrained(context.model_path, **context.weights))

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        preference = context.spec.preference
        options: dict[str, Any] = {}
        if context.spec.method.type == "full" and not preference.precompute_reference:
            options["ref_model"] = self.load_model(context).model.requires_grad_(False)
        return way(context.spec).trainer(context, options)


class Way(Protocol):
    """What depends on the kind of rows that a loss learns from."""

    column: str
    """Of the rows after `fitting`."""

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        """Return the names of the columns to read."""
        ...

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        """Return the rows that can be used. Raises Failure."""
        ...

    def alike(self, rows: Rows, contents: Iterator[Sequence[str | bytes]]) -> Alike:
        """Return what rows share that are all learnt or all held out, as `Task.alike`."""
        ...

    def check(self, spec: FineTuneJobSpec) -> None:
        """Check the layout of the training. Raises Failure."""
        ...

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str) -> Dataset:
        """Return the tokens of the rows. Raises Failure."""
        ...

    def trial(self, model: Model, task: str, spec: FineTuneJobSpec, rows: Dataset | None) -> Trial:
        """Return a step of the training, as `Task.trial`."""
        ...

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        """Return the arguments of the trainer."""
        ...

    def trainer(self, context: TrainingContext, options: Mapping[str, Any]) -> TrainerSetup:
        """Return the trainer. `options`: those that all have."""
        ...


class Pairs:
    """Which of two answers is better."""

    column = pairs.PAIR

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (*pairs.wanted(spec), *rated.NEEDED)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        """Return the pairs. Raises Failure if the rows are no pairs."""
        there = rows.names or tuple(rows.data.column_names)
        answers = {spec.dataset.columns.chosen, spec.dataset.columns.rejected}
        if {rated.roles(spec)[role] for role in rated.NEEDED} <= set(there) and not answers & set(there):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.preference.lossType: {spec.preference.loss_type} learns from pairs, and the rows of"
                f" {rows.origin} are answers with a label. Choose kto for them",
            )
        return pairs.read(rows, spec)

    def alike(self, rows: Rows, contents: Iterator[Sequence[str | bytes]]) -> Alike:
        return Alike(contents)

    def check(self, spec: FineTuneJobSpec) -> None:
        return

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str) -> Dataset:
        return pair_tokens.pair_rows(rows, tokenizer, spec, use)

    def trial(self, model: Model, task: str, spec: FineTuneJobSpec, rows: Dataset | None) -> Trial:
        from luthier_trainer.tasks import trl_steps

        return trl_steps.of_pairs(model, task, spec, rows)

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        from trl import DPOConfig

        return DPOConfig(
            **common,
            beta=spec.preference.beta,
            loss_type=[spec.preference.loss_type],
            label_smoothing=spec.preference.label_smoothing or 0.0,
            # TRL then loads no second model. With an adapter it would load none anyway, and only read all weights.
            precompute_ref_log_probs=spec.preference.precompute_reference and spec.method.type == "full",
        )

    def trainer(self, context: TrainingContext, options: Mapping[str, Any]) -> TrainerSetup:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        from luthier_trainer.tasks.dpo import PairMetrics, PreferenceTrainer

        kept_in = context.folder / "reference" if context.spec.preference.precompute_reference else None
        return TrainerSetup(
            PreferenceTrainer,
            DataCollatorForPreference(context.processor.pad_token_id),
            {**options, "compute_metrics": PairMetrics(), "kept_in": kept_in, "preference": context.spec.preference},
        )


class Rated:
    """Whether an answer is good."""

    column = rated.RATED

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return rated.wanted(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return rated.read(rows, spec)

    def alike(self, rows: Rows, contents: Iterator[Sequence[str | bytes]]) -> Alike:
        """Answers to a prompt are compared with each other, and those of a pair must not be on both sides."""
        return Alike(rated.prompts(rows), named="answer the same prompt as", can_deduplicate=False)

    def check(self, spec: FineTuneJobSpec) -> None:
        """Raise Failure if a micro-batch has one row."""
        rows, _ = micro_batch(spec, spec.training.batch_size // spec.resources.world_size)
        if rows < 2:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.training.microBatchSize: is {rows}, and KTO compares the answers of a micro-batch with each"
                " other's prompts; set 2 or more, and batchSize to a multiple of it for each process",
            )

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str) -> Dataset:
        return rated.rated_rows(rows, tokenizer, spec, use)

    def trial(self, model: Model, task: str, spec: FineTuneJobSpec, rows: Dataset | None) -> Trial:
        from luthier_trainer.tasks import trl_steps

        return trl_steps.of_rated(model, task, spec, rows)

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        from trl import KTOConfig

        return KTOConfig(**common, beta=spec.preference.beta, train_sampling_strategy="sequential")

    def trainer(self, context: TrainingContext, options: Mapping[str, Any]) -> TrainerSetup:
        from luthier_trainer.tasks.kto import MismatchingCollator, RatedTrainer

        return TrainerSetup(
            RatedTrainer,
            # The answer after another prompt may be longer than maxLength.
            MismatchingCollator(context.processor.pad_token_id, context.spec.training.max_length),
            {**options, "preference": context.spec.preference},
        )


PAIRS, RATED = Pairs(), Rated()
WAYS: Mapping[str, Way] = {"sigmoid": PAIRS, "robust": PAIRS, "hinge": PAIRS, "ipo": PAIRS, "kto": RATED}


def way(spec: FineTuneJobSpec) -> Way:
    """Return how the rows of a job are learnt from."""
    return WAYS[spec.preference.loss_type]


def _encoded(data: Dataset) -> tuple[str, ...]:
    """Return the columns of token ids: of the prompt, then of its answers."""
    return pair_tokens.ENCODED if pair_tokens.ENCODED[1] in data.column_names else rated.ENCODED


def _tokens(data: Dataset, column: str) -> int:
    return sum(len(ids) for ids in data[column])
