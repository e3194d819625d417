"""The loss of a language model, computed in its `forward`: if possible, the logits of all tokens never exist at once.

For the loss, the head gives the model `LazyLogits`. The model does with them what it does with logits, and hands them
to its loss function, which is the one of this module. So terms that a model adds to its loss stay, and whatever wraps
the model (DDP, DeepSpeed, autocast, PEFT) sees one ordinary `forward`.

Libraries have such losses, too. TRL's multiplies with the head once more in the backward pass, Liger's needs Triton,
and both find what a model does with its logits by the names of fields in its configuration.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutput

from luthier_trainer.models.chunked_loss import chunk_tokens
from luthier_trainer.models.isolation import small_model
from luthier_trainer.models.lazy_logits import LazyLogits
from luthier_trainer.models.output_head import OutputHead
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.batches import IGNORED

if TYPE_CHECKING:
    from luthier_api.finetune import FineTuneJobSpec
    from luthier_trainer.models.memory import Trial

LIMIT = 1e-4
"""The largest difference that is only rounding, as a share of the largest gradient, in fp32.

With small models of all causal architectures of transformers 5.23 it is at most 5e-6.
"""


class TokenLoss:
    """Computes the loss in the `forward` of a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        chunked: bool,
        epsilon: float | None = None,
        tokens: int | None = None,
        *,
        shifted: bool = True,
        counts_right: bool = False,
    ) -> None:
        """From now on `model` computes this loss when it gets labels, and its output then has no logits.

        While it learns, the output has the loss alone. In evaluations it also has, in the place of logits, what
        `row_sums` returns. `chunked`: whether logits exist for some `tokens` at a time (None: as suits the device), or
        all at once. `epsilon`: share of each label that is spread over the vocabulary while the model learns.
        `shifted`: whether a token is predicted from those before it; otherwise each logit is for the label at its own
        place. `counts_right`: whether evaluations also count labels that have the largest logit.
        """
        self.model, self.epsilon, self.tokens = model, epsilon or 0.0, tokens
        self.shifted, self.counts_right = shifted, counts_right
        self.head = OutputHead(model) if chunked else None
        if self.head is not None and is_deepspeed_zero3_enabled() and not self.head.is_linear:
            self.head = None  # DeepSpeed would gather the parts of the head for each chunk again
        self.computed_for: list[str] = []
        """What the logits of all tokens were computed for although `chunked`; empty if they never were."""
        self._sums: torch.Tensor | None = None
        self._told = False
        self._forward = model.forward
        # Models that call the loss function of transformers compute it correctly and add their own terms, for example
        # for the load balance of experts. Other models (the decoders of BART, Pegasus, ...) average over each
        # micro-batch separately, and compare each prediction with the token at the same position instead of the next.
        # Models of other tasks than causal-lm get no labels: what they add to their loss was never learnt there.
        self._calls = shifted and "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
        if self._calls:
            model.loss_function = self._loss
        model.accepts_loss_kwargs = True  # transformers then passes the number of items of a step to the model
        # Bound, as accelerate and transformers expect it of the method that this one replaces.
        model.forward = MethodType(self._forward_with_loss, model)

    @property
    def described(self) -> str:
        """How the loss is computed, for the log."""
        if self.head is None:
            return "loss with the logits of all tokens"
        return f"loss with the logits of {self._tokens(self.model.device.type)} tokens at a time"

    def _tokens(self, device: str) -> int:
        assert self.head is not None
        return self.tokens or chunk_tokens(self.head.vocabulary, device)

    def _forward_with_loss(
        self,
        _: PreTrainedModel,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        """The `forward` of the model. `labels`: [rows, length]; `num_items_in_batch`: labels of the whole step."""
        if labels is None:
            return self._forward(*args, **options)
        options["return_dict"] = True
        if self._calls:
            options |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
        with self.head.lazy(self.computed_for) if self.head else nullcontext():
            outputs = self._forward(*args, **options)
        loss = outputs.loss if self._calls else self._loss(outputs.logits, labels, 0, num_items_in_batch)
        if self.computed_for and not self._told:
            self._told = True
            notice(f"spec.model: the loss holds the logits of all tokens, for {self.computed_for[0]}")
        sums, self._sums = self._sums, None
        return CausalLMOutput(loss=loss, logits=sums)

    def _loss(
        self,
        logits: torch.Tensor | LazyLogits,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """The `loss_function` of the model: the mean of the cross-entropy of each label, in nats.

        `logits`: [rows, length, vocabulary]. The sum is divided by `num_items_in_batch`, or by the labels of the batch.
        """
        learns = torch.is_grad_enabled()
        epsilon = self.epsilon if learns else 0.0
        targets = (functional.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.shifted else labels).flatten()
        if isinstance(logits, LazyLogits):
            total, losses = self._chunk_by_chunk(logits, targets, epsilon)
        else:
            losses = functional.cross_entropy(
                logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="none", label_smoothing=epsilon
            )
            total = losses.sum()
        if not learns:
            numbers = [losses, targets != IGNORED]
            if self.counts_right:
                numbers.append(self._best(logits, targets) == targets)
            self._sums = row_sums(*(number.view(labels.shape) for number in numbers))
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)

    def _best(self, logits: torch.Tensor | LazyLogits, targets: torch.Tensor) -> torch.Tensor:
        """Return the token with the largest logit where there is a label, int64 [rows x length]; elsewhere -1."""
        if isinstance(logits, torch.Tensor):
            return torch.where(targets == IGNORED, -1, logits.argmax(dim=-1).flatten())
        assert self.head is not None
        learnt = _places(targets)
        hidden = logits.hidden.flatten(0, 1).index_select(0, learnt)
        found = self.head.best(hidden, logits.operations, self._tokens(hidden.device.type))
        return torch.full_like(targets, -1).index_copy(0, learnt, found)

    def _chunk_by_chunk(
        self, logits: LazyLogits, targets: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum, fp32 [rows x length]) of the losses of `targets` [rows x length]; those ignored have 0."""
        learnt = _places(targets)
        hidden = logits.hidden.flatten(0, 1).index_select(0, learnt)
        assert self.head is not None
        options = {"tokens": self._tokens(hidden.device.type), "operations": logits.operations, "smoothing": epsilon}
        total, losses = self.head.cross_entropy(hidden, targets[learnt], **options)
        everywhere = losses.new_zeros(len(targets)).index_copy(0, learnt, losses)
        return total, everywhere


def _places(targets: torch.Tensor) -> torch.Tensor:
    """Return where there are labels, int64 [labels], in `targets` [rows x length]."""
    if targets.is_meta:  # where memory is planned: no value is known, and each label may be learnt
        return torch.arange(len(targets), device=targets.device)
    return (targets != IGNORED).nonzero()[:, 0]


def row_sums(*numbers: torch.Tensor) -> torch.Tensor:
    """Return the sums of each row, double [rows, numbers], of numbers [rows, length] of its tokens.

    They are the loss (nats), whether the token is predicted, and, where that is counted, whether it is right.
    """
    return torch.stack([number.double().sum(dim=1) for number in numbers], dim=1)


def planned(trial: Trial, spec: FineTuneJobSpec, whole: str | None, **options: Any) -> Trial:
    """Return a step whose model computes this loss. `whole`: of `why_whole`. `options`: of `TokenLoss`."""
    device = "cuda" if spec.resources.gpus_per_node else "cpu"
    tokens = chunk_tokens(trial.model.config.get_text_config().vocab_size, device)
    TokenLoss(trial.model, whole is None, spec.training.label_smoothing, tokens, **options)
    return replace(trial, loss=None, loss_tokens=tokens if whole is None else 0)


def why_whole(config: PreTrainedConfig, task: str = "causal-lm") -> str | None:
    """Return why the loss of such a model holds the logits of all tokens; None if it does not have to.

    Both losses and their gradients are compared for a model with this configuration, but few and narrow layers.
    """
    kind = config.model_type
    try:
        whole, _ = _gradients(config, task, chunked=False)
        chunked, computed_for = _gradients(config, task, chunked=True)
    except Exception as error:  # each architecture fails in its own way
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"a small {kind} could not be tried without them ({what})"
    if computed_for:
        return f"{kind} computes more with its logits than their loss ({', '.join(sorted(set(computed_for)))})"
    difference = float((chunked - whole).abs().max() / whole.abs().max())
    if not difference < LIMIT:
        return f"the gradients of a small {kind} differ without them by {difference:.2g}"
    return None


def _gradients(config: PreTrainedConfig, task: str, chunked: bool) -> tuple[torch.Tensor, list[str]]:
    """Return (loss and all gradients of a small model, fp32 [1 + weights]; what its logits were computed for)."""
    model = small_model(config, task).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = TokenLoss(model, chunked, tokens=4, shifted=task == "causal-lm")
    labels = torch.tensor([[IGNORED, *range(11, 21)], [*range(21, 30), IGNORED, IGNORED]])
    inputs: dict[str, Any] = {"input_ids": labels.clamp(min=0)}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if task != "masked-lm":
        inputs["use_cache"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model(**inputs, labels=labels, num_items_in_batch=30)
    outputs.loss.backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat([outputs.loss.detach()[None], *gradients]), loss.computed_for
