"""Counts the weights of a model that is about to learn, for the log."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from luthier_trainer.models.compute import size


def count_weights(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Return the number of trainable weights and of all weights.

    Weights that DeepSpeed has sharded, or that bitsandbytes has packed, count with their original size.
    """
    sizes = [(size(weight), weight.requires_grad) for weight in parameters]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
