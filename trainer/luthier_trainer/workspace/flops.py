"""The floating-point operations of a training: one formula for the plan, the metric of utilisation and benchmarks.
Imports no torch.

*Model* operations are those that the training cannot do without (MFU: arXiv:2204.02311, appendix B, with attention).
*Hardware* operations are those and what activation checkpointing computes again: the layers, forward. What kernels of
flash attention compute again in the backward pass is in neither of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier_api.run import Compute

MULTIPLY_ADD = 2  # operations


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a training on one unit: a token, or an image."""

    model: float
    """That the training cannot do without."""
    hardware: float
    """With those of recomputed activations."""


def attention(compute: Compute, length: float) -> float:
    """Return the multiply-adds of attention, forward, for one token of a row of `length` tokens.

    Two products, of the queries with keys and of the probabilities with values. Layers with a sliding window attend to
    the tokens in it, of which there are fewer at the beginning of a row.
    """
    attended = length / 2 if compute.causal else length
    near = attended
    if compute.window is not None and compute.window < length:
        window = compute.window
        near = window - window**2 / (2 * length) if compute.causal else float(window)
    return 2 * (compute.attention_width * attended + compute.window_width * near)


def per_unit(compute: Compute, recomputed: bool, length: float | None = None) -> Flops:
    """Return the operations of training on one unit.

    A multiplication with one weight is 2 operations, forward. Backward, it is 2 more for the gradient of what came in,
    and 2 more for that of the weight, if the weight learns: 6 operations a weight in full fine-tuning, 4 for a frozen
    one. The input embedding is looked up and not multiplied. The two products of attention have no weights, and cost
    twice as much backward as forward. A token of a causal model attends to half of its row on average.

    `recomputed`: whether activations are. `length`: tokens of a row; that of `compute` when left out.
    """
    products = compute.attention_macs + attention(compute, compute.length if length is None else length)
    weights = compute.multiplied + compute.adapters
    forward = weights + products
    model = 2 * weights + compute.learning + 3 * products + compute.frozen_models + compute.references * forward
    again = forward - compute.head if recomputed else 0
    return Flops(model=MULTIPLY_ADD * model, hardware=MULTIPLY_ADD * (model + again))
