"""What a model gets from its head in place of logits: a note of how they would be computed.

Models scale or cap their logits before they hand them to their loss. These operations are noted here, and the loss
applies them to a few tokens at a time. If a model does anything else with its logits, they are computed as ever, so
that no model computes anything wrong, and `LazyLogits.computed_for` has the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from luthier_trainer.models.chunked_loss import Operation

ELEMENTWISE = {torch.tanh, torch.mul, torch.multiply, torch.div, torch.divide, torch.true_divide}
"""Functions that treat each logit for itself, if their other operands are numbers."""


class Head(Protocol):
    """Makes logits."""

    vocabulary: int
    module: torch.nn.Module


class LazyLogits:
    """Logits [rows, length, vocabulary] that are not computed yet. Operations on each of them give a new object."""

    def __init__(
        self, hidden: torch.Tensor, head: Head, computed_for: list[str], operations: Sequence[Operation] = ()
    ) -> None:
        """`hidden`: what the head was given, [rows, length, width]."""
        self.hidden, self.head, self.operations = hidden, head, operations
        self.computed_for = computed_for
        """Gets the names of the operations for which logits had to be computed."""
        self._tensor: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.vocabulary))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def then(self, operation: Operation) -> LazyLogits:
        """Return the logits after an operation on each of them alone."""
        return LazyLogits(self.hidden, self.head, self.computed_for, (*self.operations, operation))

    def tensor(self, why: str) -> torch.Tensor:
        """Return the logits, all at once. `why`: what needs them."""
        if self._tensor is None:
            self.computed_for.append(why)
            logits = self.head.module(self.hidden)
            for operation in self.operations:
                logits = operation(logits)
            self._tensor = logits
        return self._tensor

    def tanh(self) -> LazyLogits:
        return self.then(torch.tanh)

    def float(self) -> LazyLogits:
        return self.then(torch.Tensor.float)

    def contiguous(self) -> LazyLogits:
        return self

    def to(self, *args: Any, **options: Any) -> LazyLogits:
        return self.then(lambda logits: logits.to(*args, **options))

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)

    __radd__ = __add__

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.tensor("[]")[key]

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the tensor, which is computed for it. Raises AttributeError for special methods."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(name), name)

    def _is_bias(self, other: Any) -> bool:
        """Whether `other` is one number for each token of the vocabulary, which does not learn (BART's)."""
        return (
            isinstance(other, torch.Tensor)
            and other.numel() == other.shape[-1] == self.head.vocabulary
            and not other.requires_grad
        )

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), options: Any = None) -> Any:
        """Called by torch for its functions that get such an object."""
        first, *others = args
        numbers = all(isinstance(other, int | float) for other in others)
        if function in ELEMENTWISE and isinstance(first, LazyLogits) and numbers and not options:
            return first.then(lambda logits: function(logits, *others))
        if function is torch.add and isinstance(first, LazyLogits) and not options and first._is_bias(others[0]):
            return first.then(lambda logits: logits + others[0].flatten())
        args, options = tree_map_only(
            LazyLogits, lambda logits: logits.tensor(function.__name__), (tuple(args), options or {})
        )
        return function(*args, **options)
