"""The method of a FineTuneJob: which weights learn, and how. `methods` is the table of the types."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import SET, ApiModel, Format, Rule
from luthier_api.marks import For, by_table
from luthier_api.methods import METHODS, MethodType
from luthier_api.spec import ShortText

Pattern = Annotated[dict[str, Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=64)]
Layer = Annotated[int, Field(ge=0, le=10_000)]


InitLoraWeights = Annotated[
    str,
    Format(
        "^(gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]{1,2}|loftq)$",
        "must be gaussian, orthogonal, olora, pissa, pissa_niter_N, for example pissa_niter_16, or loftq",
    ),
]


OPTIONS_OF_ADALORA = METHODS["adalora"].options
RANK = f"(has(self.rank) ? self.rank : {OPTIONS_OF_ADALORA['method.rank']})"
INITIAL_RANK = f"(has(self.initialRank) ? self.initialRank : {OPTIONS_OF_ADALORA['method.initialRank']})"


def fraction(name: str) -> str:
    """CEL: a share of the steps, of adalora."""
    return f"(has(self.{name}) ? self.{name} : {OPTIONS_OF_ADALORA[f'method.{name}']})"


class Method(ApiModel):
    """Which weights learn, and how."""

    type: MethodType = "lora"
    """full: all weights, or those of some `layers`, without what `freeze` names. bitfit: the biases. The others train
    an adapter beside a frozen model. lora: low-rank matrices. qlora: the common name of lora on a model whose linear
    layers are quantised to 4 bits (`model.quantization.type: nf4`). adalora: low-rank matrices that share a budget of
    ranks, by importance. ia3: a factor for each output of some modules. prompt: virtual tokens before each text.
    p-tuning: virtual tokens that a small network makes. prefix: keys and values before each text, in every layer.
    docs/matrix.md says what works together.
    """
    rank: Annotated[int, Field(ge=1, le=1024), For("method")] = by_table()
    """Rank of the adapters; of adalora, the mean rank at the end."""
    initial_rank: Annotated[int, Field(ge=2, le=1024), For("method")] = by_table()
    """Rank of all adapters in the beginning, more than `rank`."""
    alpha: Annotated[int, Field(ge=1, le=4096), For("method")] = by_table()
    """Scale of the adapters: their output counts alpha / rank; of adalora, alpha / initialRank."""
    dropout: Annotated[float, Field(ge=0, lt=1), For("method")] = by_table()
    """Dropout before the adapters. Adapters on the experts of a mixture of experts have none."""
    target_modules: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET, For("method")] = by_table()
    """Modules that get an adapter: all-linear, or names such as q_proj, or regular expressions for the end of the names
    of linear modules; for the experts of a mixture of experts, their parameters' names, such as gate_up_proj. For ia3,
    when left out: keys, values and the second matrix of the feed-forward block, by PEFT's table of architectures.
    """
    feedforward_modules: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET, For("method")] = by_table()
    """Those of `targetModules` whose inputs get the factors, instead of their outputs."""
    initial_fraction: Annotated[float, Field(ge=0, lt=1), For("method")] = by_table()
    """Share of the steps, at the beginning, in which all adapters keep `initialRank`."""
    final_fraction: Annotated[float, Field(ge=0, lt=1), For("method")] = by_table()
    """Share of the steps, at the end, in which the ranks do not change any more."""
    orthogonal_weight: Annotated[float, Field(ge=0, le=100), For("method")] = by_table()
    """Weight in the loss of how far the matrices are from orthogonal ones. evalLoss is without it."""
    virtual_tokens: Annotated[int, Field(ge=1, le=1024), For("method")] = by_table()
    """Number of virtual tokens. With prompt and p-tuning they take positions of the model besides maxLength."""
    prompt_init: Annotated[Literal["text", "vocabulary", "random"], For("method")] = by_table()
    """What virtual tokens begin as. text: the embeddings of `promptText`. vocabulary: those of tokens drawn by the
    seed. random: normally distributed numbers, from which they seldom learn well. When left out: text where there is a
    promptText, or else vocabulary.
    """
    prompt_text: Annotated[str, Field(min_length=1, max_length=10_000), For("method")] = by_table()
    """Text that virtual tokens begin as, such as the instruction: cut, or repeated, to as many tokens."""
    encoder: Annotated[Literal["mlp", "lstm"], For("method")] = by_table()
    """The network that makes virtual tokens. lstm: a bidirectional one before the layers."""
    encoder_hidden_size: Annotated[int, Field(ge=1, le=65_536), For("method")] = by_table()
    """Width of the network that makes virtual tokens, or with `projection` of the one that makes the prefix; that of
    the model when left out.
    """
    projection: Annotated[bool, For("method")] = by_table()
    """Whether a network of two layers makes the prefix, which then learns more stably. It is no part of the result."""
    freeze: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET, For("method")] = by_table()
    """Modules that do not learn: names such as embed_tokens, or regular expressions for the end of their names."""
    rslora: Annotated[bool, For("method"), For("task")] = by_table()
    """Scale the adapters' output by alpha / sqrt(rank) instead of alpha / rank, so that a large rank learns as fast as
    a small one (rsLoRA, arXiv:2312.03732).
    """
    dora: Annotated[bool, For("method"), For("task")] = by_table()
    """Learn the norm of each row of the weights beside its direction (DoRA, arXiv:2402.09353)."""
    rank_pattern: Annotated[Pattern, For("method"), For("task")] = by_table()
    """Name of modules, or a regular expression for the end of their names → their rank instead of `rank`. The first one
    that matches counts.
    """
    alpha_pattern: Annotated[Pattern, For("method"), For("task")] = by_table()
    """The same for `alpha`."""
    layers: Annotated[list[Layer], Field(min_length=1, max_length=1000), For("method"), For("task")] = by_table()
    """Numbers of the layers that get adapters, from 0; all when left out. Of full: those that learn. What is in no
    layer, such as embeddings and heads, learns in any case, unless `freeze` names it.
    """
    init_lora_weights: Annotated[InitLoraWeights, For("method"), For("task")] = by_table()
    """What adapters begin as, by PEFT's names. When left out: A is random and B zero. gaussian: another random A.
    orthogonal: both random, with a product of zero (even ranks only). pissa: the largest singular values of the weights
    (arXiv:2404.02948); pissa_niter_16: the same with a fast approximation. olora: their QR decomposition
    (arXiv:2406.01775). With pissa and olora the base stays as it is, and the result is an adapter of twice the rank.
    loftq: what the base in nf4 or fp4 has lost (arXiv:2310.08659, one iteration); the result fits the base in that type
    alone, and model.job of other jobs merges it so.
    """
    bias: Annotated[Literal["none", "all", "lora_only"], For("method"), For("task")] = by_table()
    """Biases of the model that are trained beside the adapters, and saved with them. all: all of them. lora_only: those
    of modules with an adapter. vLLM loads no such adapters; merge them for it.
    """
    modules_to_save: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET, For("method"), For("task")] = (
        by_table()
    )
    """Modules that are trained whole beside the adapters, and saved with them, such as embed_tokens, lm_head or norm.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.targetModules) || !('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            "method.targetModules: all-linear takes every module already; write it alone, or list names only",
        ),
        Rule(
            f"self.type != 'adalora' || {INITIAL_RANK} > {RANK}",
            "method.initialRank: adalora takes ranks away until `rank` are left on average; choose more than rank",
        ),
        Rule(
            f"{fraction('initialFraction')} + {fraction('finalFraction')} < 1.0",
            "method.finalFraction: no steps are left between initialFraction and finalFraction; choose less",
        ),
        Rule(
            "!has(self.promptInit) || (self.promptInit == 'text') == has(self.promptText)",
            "method.promptInit: text needs promptText, and the others ignore it; set both, or one of the others alone",
        ),
        Rule(
            "!has(self.encoderHiddenSize) || self.type != 'prefix' || has(self.projection) && self.projection",
            "method.encoderHiddenSize: a prefix without projection has no network; set projection: true, or remove it",
        ),
        Rule(
            "!has(self.feedforwardModules) || has(self.targetModules) && ('all-linear' in self.targetModules ||"
            " self.feedforwardModules.all(name, name in self.targetModules))",
            "method.feedforwardModules: names some of targetModules; set both, or remove it",
        ),
    )
