"""The tasks of a FineTuneJob: one file each says what its model class, its batches and its figures are. `TASKS` is the
list.

Neighbour: `taskfacts`, for those who only want to know how a task is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from luthier_trainer.tasks.causal_lm import CausalLM
from luthier_trainer.tasks.image_classification import ImageClassification
from luthier_trainer.tasks.text_classification import TextClassification

Loss = Callable[..., Any]
"""(the model's outputs, labels, num_items_in_batch=) → the loss, as transformers' Trainer calls its
`compute_loss_func`.
"""


class Task(Protocol):
    """What training has to know of a task."""

    def load_model(self, path: str, labels: list[str] | None, **options: Any) -> tuple[Any, list[str]]:
        """The model from folder `path`, and the names of its modules that have new weights: they are trained whole."""
        ...

    def collator(self, processor: Any) -> Any:
        """Rows of the prepared dataset → a batch of tensors. `processor`: a tokenizer, or an image processor."""
        ...

    def idle(self, model: Any, processor: Any) -> set[str]:
        """Names of the weights that have no part in this task: they stay as they are, and no adapter sits on them."""
        ...

    def loss(self, model: Any) -> Loss | None:
        """What training minimises; None where the model's own loss is exactly that.

        The batch's sum, divided by the items of the whole step: all micro-batches of all processes. transformers 5.23
        leaves that division to every model whose `forward` takes keywords, and then neither averages over micro-batches
        nor over processes; but many of them take the keywords and never look.
        """
        ...

    def figures(self) -> Any:
        """Accumulates an evaluation: `reduce` on each process, batch by batch, then called with what all processes
        gathered.
        """
        ...


TASKS: dict[str, Task] = {
    "causal-lm": CausalLM(),
    "text-classification": TextClassification(),
    "image-classification": ImageClassification(),
}
