"""preference: learn from pairs of answers which one is better (DPO, arXiv:2305.18290), with TRL's DPOTrainer.

The reward of an answer is the increase of its log-probability over the reference, which is the model that the training
started from. With an adapter, the reference is the base model without it; otherwise it is a second, frozen copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import columns, pair_tokens, pairs, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.pair_tokens import ENCODED
from luthier_trainer.models import embedding, inspect
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, TrainerSetup, TrainingContext
from luthier_trainer.tasks.texts import ADD_ROWS, TextTask, check_ends

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments

FUSED_TOLERANCE = 0.05  # nats: possible error of a log-probability in 16-bit arithmetic


class PreferenceTask(TextTask):
    """The task preference."""

    task = "preference"

    # ---- prepare

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return pairs.wanted(spec)

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        return pairs.read(rows, spec)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        """Check tokenizer, model and target modules. Raises Failure if one does not fit."""
        check_ends(model.processor)
        super().check_model(model, spec, rows, labels)
        if spec.method.type == "full":
            return
        skeleton = inspect.skeleton(model.config, self.task, inspect.MODEL)
        head = next(name for name, m in skeleton.named_modules() if m is skeleton.get_output_embeddings())
        for i, target in enumerate(spec.method.target_modules):
            if f".{head}".endswith(f".{target}"):
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"spec.method.targetModules[{i}]: TRL reads the weights of {head} without an adapter, which would"
                    f" never learn; leave {target} out",
                )

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        return pair_tokens.pair_rows(rows, processor, spec, use)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        return pairs.joined(rows.data)

    def added_tokens(self, processor: PreTrainedTokenizerBase) -> int:
        return super().added_tokens(processor) + 1  # the end-of-text token

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        """Check that each split has pairs and that the model knows their tokens. Raises Failure if not."""
        for name, rows in data.items():
            if len(rows) == 0:
                raise columns.invalid(
                    f"{tokens.MAX_LENGTH}: no prompt of the {name} split leaves room for an answer; set it higher"
                )
        embedding.check_rows(model.missing_tokens, data, model.processor, inspect.MODEL, ADD_ROWS, ENCODED)

    def count_tokens(self, data: Dataset) -> int:
        """Return the number of tokens in both sequences of each pair; a prompt counts twice."""
        prompts, chosen, rejected = (sum(len(ids) for ids in data[name]) for name in ENCODED)
        return 2 * prompts + chosen + rejected

    # ---- training

    def rows(self, batch: Batch) -> int:
        return len(batch["input_ids"]) // 2  # the chosen sequences, then the rejected ones

    def tokens(self, batch: Batch) -> torch.Tensor:
        return batch["attention_mask"].sum()

    def computed_tokens(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def without_weight(self, batch: Batch) -> Batch:
        return batch  # TRL's loss does not count items

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        from trl import DPOConfig

        return DPOConfig(
            **common,
            beta=spec.preference.beta,
            loss_type=[spec.preference.loss_type],
            max_length=None,  # `encode` has cut the answers
            gradient_checkpointing=False,  # `common` sets it under the name that transformers uses
        )

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForCausalLM

        return LoadedModel(AutoModelForCausalLM.from_pretrained(context.model_path, **context.weights))

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        options: dict[str, Any] = {"compute_metrics": PairMetrics()}
        if context.spec.method.type == "full":
            options["ref_model"] = self.load_model(context).model.requires_grad_(False)
        return TrainerSetup(trainer_class(), DataCollatorForPreference(context.processor.pad_token_id), options)


@cache
def trainer_class() -> type:
    """Return a subclass of TRL's trainer that sends no reports, writes no cards and computes exact evaluation metrics.

    This is a function so that TRL and torch are imported only when they are needed.
    """
    import torch
    from torch.nn.functional import logsigmoid
    from trl import DPOTrainer

    losses = {
        "sigmoid": lambda margin, chosen, rejected, beta: -logsigmoid(margin),
        "hinge": lambda margin, chosen, rejected, beta: torch.relu(1 - margin),
        "ipo": lambda margin, chosen, rejected, beta: (chosen - rejected - 1 / (2 * beta)) ** 2,
    }

    class PreferenceTrainer(DPOTrainer):
        def __init__(self, *, model: Any, **options: Any) -> None:
            # TRL 1.16 adds a copy of the adapter as the reference, and converts adapters on a quantised model to bf16,
            # in which small updates are lost to rounding. Both are undone here.
            initial = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
            super().__init__(model=model, **options)
            if "ref" in getattr(model, "peft_config", {}):
                model.delete_adapter("ref")
            for name, weight in model.named_parameters():
                if name in initial:
                    weight.data = initial[name]
            check_fused_head(model)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # `prepare` has already encoded it

        def _send_telemetry(self) -> None:
            return

        def create_model_card(self, *_: Any, **__: Any) -> None:
            return

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            # TRL 1.16 gathers metrics for its log after each micro-batch. In the last micro-batches of an epoch the
            # processes may have different numbers of rows, with which this collective would never finish.
            accelerator = self.accelerator
            accelerator.gather = accelerator.gather_for_metrics = lambda tensor, *_, **__: tensor
            try:
                return super().compute_loss(*args, **options)
            finally:
                del accelerator.gather, accelerator.gather_for_metrics

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
            """Return the mean loss, and loss and both rewards of each pair, double [pairs, 3].

            TRL's own metrics are means over a batch that include the rows which fill it up. The third value is a
            placeholder for labels, because transformers computes metrics only if there are labels.
            """
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
                outputs = model(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    labels=labels,
                    use_cache=False,
                    fused_lm_head=True,
                )
                chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
                before = self.compute_ref_log_probs(self.ref_model or model, inputs)
            chosen, rejected = chosen.float() - before[0].float(), rejected.float() - before[1].float()
            lengths = inputs["completion_mask"].sum(dim=1).clamp(min=1).chunk(2)
            loss = losses[self.loss_types[0]](
                self.beta * (chosen - rejected), chosen / lengths[0], rejected / lengths[1], self.beta
            )
            pairs = torch.stack([loss, self.beta * chosen, self.beta * rejected], dim=1).double()
            return loss.mean(), pairs, torch.zeros(len(pairs), device=pairs.device)

    return PreferenceTrainer


class PairMetrics:
    """Computes evalLoss, rewardAccuracy and rewardMargin, each a mean over all held-out pairs."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.pairs, self.loss, self.right, self.margin = 0, 0.0, 0, 0.0

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        loss, chosen, rejected = gathered.predictions.unbind(dim=1)
        self.pairs += len(loss)
        self.loss += loss.sum().item()
        self.right += int((chosen > rejected).sum().item())
        self.margin += (chosen - rejected).sum().item()
        if not compute_result:
            return {}
        metrics = {
            "loss": self.loss / self.pairs,
            "rewardAccuracy": self.right / self.pairs,
            "rewardMargin": self.margin / self.pairs,
        }
        self._begin()
        return metrics


def check_fused_head(model: Any) -> None:
    """Check that TRL computes the same log-probabilities as the model. Raises Failure if not.

    TRL computes them from the last hidden state and the weights of the head. That is wrong for models whose head has
    layers before those weights (BERT's decoders).
    """
    import torch

    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    with torch.no_grad():
        training = model.training
        model.eval()
        own = model(input_ids=ids).logits.float().log_softmax(dim=-1)[0, :-1]
        fused = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).log_probs[0]
        model.train(training)
    expect = own.gather(1, ids[0, 1:, None])[:, 0]
    if not torch.allclose(fused.float(), expect, atol=FUSED_TOLERANCE):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.model: TRL cannot read log-probabilities from a {model.config.model_type}, which computes its logits"
            " in a way of its own. Choose another model for the task preference",
        )
