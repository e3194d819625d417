"""The settings of the tasks that learn from answers which are compared: preference and reward."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Rule


class Preference(ApiModel):
    """How a model learns to prefer answers."""

    beta: Annotated[float, Field(gt=0, le=10)] = 0.1
    """How strongly the model is held to the one it started from: larger values change it less."""
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "kto"] = "sigmoid"
    """Of pairs of answers: sigmoid, DPO (arXiv:2305.18290); robust, DPO for pairs of which some are the wrong way round
    (arXiv:2403.00409), as many as `labelSmoothing` says; hinge, SLiC (arXiv:2305.10425); ipo, IPO (arXiv:2310.12036),
    which overfits less where one answer is always preferred. Of answers that are good or bad each:
    kto, KTO (arXiv:2402.01306), for rows with the columns completion and label; it takes pairs apart.
    """
    label_smoothing: Annotated[float | None, Field(gt=0, lt=0.5)] = None
    """With robust: the share of pairs whose answers are the wrong way round."""
    desirable_weight: Annotated[float | None, Field(gt=0, le=100)] = None
    """With kto: how much a good answer counts. When neither weight is set, the rarer kind of answers gets the weight
    with which both kinds count alike, and the status says so.
    """
    undesirable_weight: Annotated[float | None, Field(gt=0, le=100)] = None
    """With kto: how much a bad answer counts."""
    precompute_reference: bool = False
    """Compute what the reference model says of all rows once, before the first step, and keep it in the workspace. It
    takes memory for one model less with method full, and time for one pass less in each epoch. Not with kto, which also
    compares answers to other prompts, in each step others.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.lossType == 'kto' || !has(self.desirableWeight) && !has(self.undesirableWeight)",
            "preference: desirableWeight and undesirableWeight apply to lossType kto; remove them, or choose it",
        ),
        Rule(
            "self.lossType != 'kto' || !self.precomputeReference",
            "preference.precomputeReference: not with lossType kto, which compares answers to other prompts in each"
            " step; remove it, or choose sigmoid, robust, hinge or ipo for pairs",
        ),
        Rule(
            "(self.lossType == 'robust') == has(self.labelSmoothing)",
            "preference.labelSmoothing: robust needs it, and the other losses ignore it; set lossType: robust and, for"
            " example, labelSmoothing: 0.1, or remove both",
        ),
    )


class Reward(ApiModel):
    """How a model learns to rate answers."""

    center_rewards_coefficient: Annotated[float | None, Field(gt=0, le=1)] = None
    """How strongly the mean of all rewards is held at 0 (arXiv:2312.09244); 0.01 is usual. When left out, only
    differences between answers to the same prompt mean something.
    """
