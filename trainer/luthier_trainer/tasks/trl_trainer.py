"""What the trainers of TRL have in common here: what they do beside training is switched off.

A task's trainer derives from one of these mixins and from TRL's trainer. Imports torch at the top, so tasks import this
module inside the functions that need it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from luthier_api.exitcodes import ExitCode
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.runtime.failure import Failure

FUSED_TOLERANCE = 0.05  # nats: possible error of a log-probability in 16-bit arithmetic

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # at run time `super()` is the trainer of TRL that follows the mixin in the order of base classes


class Quiet(Base):
    """A mixin before a trainer of TRL: sends no reports, writes no cards, and keeps the adapter as it is."""

    def __init__(self, *, model: Any, **options: Any) -> None:
        # TRL 1.16 converts adapters on a quantised model to bf16, in which small updates are lost to rounding, and adds
        # a copy of an adapter that exists already as the reference. Both are undone here.
        initial = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
        super().__init__(model=model, **options)
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")
        for name, weight in model.named_parameters():
            if name in initial:
                weight.data = initial[name].to(weight.device)  # where the trainer has placed the model

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # `prepare` has already encoded it

    def _send_telemetry(self) -> None:
        return

    def create_model_card(self, *_: Any, **__: Any) -> None:
        return


class OverRanks(Quiet):
    """A mixin before a trainer of TRL that learns from rows, of which processes may have different numbers.

    Dropout is switched off, as TRL does it for these trainers, except that of adapters, which the method asks for.
    """

    ranks: Ranks

    def __init__(self, *, model: Any, **options: Any) -> None:
        super().__init__(model=model, **options)
        disable_dropout(model)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        # TRL 1.16 gathers metrics for its log after each micro-batch. In the last micro-batches of an epoch the
        # processes may have different numbers of rows, with which this collective would never finish. `log` gathers
        # them instead.
        accelerator = self.accelerator
        accelerator.gather = accelerator.gather_for_metrics = lambda tensor, *_, **__: tensor
        try:
            return super().compute_loss(*args, **options)
        finally:
            del accelerator.gather, accelerator.gather_for_metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of TRL's metrics over all processes. All processes call this function."""
        kept = self._metrics["train" if self.model.training else "eval"]
        kept.pop("num_tokens", None)  # begins at 0 in each attempt; transformers' own count does not
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for of_rank in self.ranks.each(lambda: {name: (sum(values), len(values)) for name, values in kept.items()}):
            for name, (value, count) in of_rank.items():
                totals[name][0] += value
                totals[name][1] += count
        kept.clear()
        kept.update({name: [value / count] for name, (value, count) in totals.items() if count})
        super().log(logs, start_time)


class AgainstReference(OverRanks):
    """A mixin before a trainer of TRL that compares the model with a reference: DPO's and KTO's."""

    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *, model: Any, **options: Any) -> None:
        super().__init__(model=model, **options)
        check_fused_head(model)


def disable_dropout(model: Any) -> None:
    """Switch off dropout in `model`, except that of adapters, which the method asks for."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name.split("."):
            module.p = 0.0


def check_fused_head(model: Any, temperature: float = 1.0) -> None:
    """Check that TRL computes the same log-probabilities as the model. Raises Failure if not.

    TRL computes them from the last hidden state and the weights of the head. That is wrong for models whose head has
    layers before those weights (BERT's decoders). `temperature`: by which TRL divides logits.
    """
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    with torch.no_grad():
        training = model.training
        model.eval()
        own = (model(input_ids=ids).logits.float() / temperature).log_softmax(dim=-1)[0, :-1]
        fused = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).log_probs[0]
        model.train(training)
    expect = own.gather(1, ids[0, 1:, None])[:, 0]
    if not torch.allclose(fused.float(), expect, atol=FUSED_TOLERANCE):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.model: TRL cannot read log-probabilities from a {model.config.model_type}, which computes its logits"
            " in a way of its own. Choose another model",
        )
