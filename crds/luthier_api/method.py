"""The method of a FineTuneJob: which weights learn, and how. `methods` is the table of the types."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import SET, ApiModel, Format, Rule
from luthier_api.marks import For, by_table
from luthier_api.methods import MethodType
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


class Method(ApiModel):
    """Which weights learn, and how."""

    type: MethodType = "lora"
    """full: all weights. lora: low-rank adapters on a frozen model. qlora: the common name of lora on a model whose
    linear layers are quantised to 4 bits (`model.quantization.type: nf4`).
    """
    rank: Annotated[int, Field(ge=1, le=1024), For("method")] = by_table()
    """Rank of the adapters."""
    alpha: Annotated[int, Field(ge=1, le=4096), For("method")] = by_table()
    """Scale of the adapters: their output counts alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1), For("method")] = by_table()
    """Dropout before the adapters. Adapters on the experts of a mixture of experts have none."""
    target_modules: Annotated[list[ShortText], Field(min_length=1, max_length=64), SET, For("method")] = by_table()
    """Modules that get an adapter: all-linear, or names such as q_proj, or regular expressions for the end of the names
    of linear modules; for the experts of a mixture of experts, their parameters' names, such as gate_up_proj.
    """
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
    """Numbers of the layers that get adapters, from 0; all when left out."""
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
    )
