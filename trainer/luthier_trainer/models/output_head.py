"""The module of a language model that makes its logits, taken out of its `forward` while a loss is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch.nn import functional
from transformers import PreTrainedModel

from luthier_trainer.models.chunked_loss import LinearHead, ModuleHead, Operation, Sum, cross_entropy
from luthier_trainer.models.lazy_logits import LazyLogits


class OutputHead:
    """The head of a model, with what an adapter has put around it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises LookupError if the model does not say which module makes its logits."""
        module = model.get_output_embeddings()
        if not isinstance(module, torch.nn.Module):
            raise LookupError(f"{type(model).__name__} does not name its output layer")
        self.module = module
        self._places = [
            (parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module
        ]
        inner = module
        while isinstance(inner, ModulesToSaveWrapper):
            inner = inner.modules_to_save[inner.active_adapters[0]]
        self._inner = inner
        self.is_linear = type(inner).forward is torch.nn.Linear.forward
        self.vocabulary = int(getattr(inner, "out_features", model.config.get_text_config().vocab_size))

    def cross_entropy(
        self, hidden: torch.Tensor, targets: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `chunked_loss.cross_entropy` does for [tokens, width] and [tokens]. `options`: of its `Sum`."""
        inner = self._inner
        if isinstance(inner, TrainableTokensWrapper):
            # PEFT computes with the matrix in which the rows that learn are replaced, and without a bias.
            return self._linear(hidden, targets, options, inner.weight)
        if self.is_linear:
            tensors = [inner.weight] if inner.bias is None else [inner.weight, inner.bias]
            # Hooks of the module (DeepSpeed's, which gather its weights) run around this.
            with _another_forward(inner, lambda given: self._linear(given, targets, options, *tensors)):
                total, losses = inner(hidden)
            return total, losses
        forward, parameters = inner.forward, list(inner.parameters())
        what = Sum(lambda learns, *tensors: ModuleHead(forward, learns, tensors), **options)
        return cross_entropy(what, hidden, targets, parameters)

    def best(self, hidden: torch.Tensor, operations: Sequence[Operation], tokens: int) -> torch.Tensor:
        """Return the index of the largest logit, int64 [tokens], of hidden states [tokens, width].

        `operations`: what the model does with its logits. `tokens`: whose logits exist at once.
        """

        def of_parts(logits: Operation) -> torch.Tensor:
            found = []
            for part in hidden.split(tokens):
                made = logits(part)
                for operation in operations:
                    made = operation(made)
                found.append(made.argmax(dim=-1))
            return torch.cat(found)

        if not self.is_linear:
            return of_parts(self.module)
        # One call of the module for all parts: DeepSpeed gathers its weights in each, as often in all processes.
        inner = self._inner
        with _another_forward(
            inner, lambda _: of_parts(lambda part: functional.linear(part, inner.weight, inner.bias))
        ):
            best: torch.Tensor = inner(hidden)
        return best

    def _linear(
        self, hidden: torch.Tensor, targets: torch.Tensor, options: dict[str, Any], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device, dtype = hidden.device.type, tensors[0].dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return cross_entropy(Sum(partial(LinearHead, dtype), **options), hidden, targets, tensors)

    @contextmanager
    def lazy(self, computed_for: list[str]) -> Iterator[None]:
        """Let the model get `LazyLogits` from its head. `computed_for`: see there."""
        lazy = _LazyHead(self, computed_for)
        for parent, name in self._places:
            parent._modules[name] = lazy
        try:
            yield
        finally:
            for parent, name in self._places:
                parent._modules[name] = self.module


class _LazyHead(torch.nn.Module):
    """Stands where the head was, and gives `LazyLogits` instead of logits."""

    def __init__(self, head: OutputHead, computed_for: list[str]) -> None:
        super().__init__()
        self._head, self._computed_for = head, computed_for

    def __getattr__(self, name: str) -> Any:
        """Models ask their head for the dtype of its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._head.module, name)

    def forward(self, hidden: torch.Tensor) -> LazyLogits:
        return LazyLogits(hidden, self._head, self._computed_for)


@contextmanager
def _another_forward(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
