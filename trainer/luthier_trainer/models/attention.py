"""Which implementations of attention a model can be computed with, found out by trying small models of its kind.

What `training.attention: auto` takes of them is planned in `workspace.plan`, where it is also known whether there are
GPUs.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import TYPE_CHECKING, Any

from luthier_api.attention import ATTENTIONS, AttentionName
from luthier_api.exitcodes import ExitCode
from luthier_trainer.models import isolation
from luthier_trainer.models.inspect import MODEL, auto_class, skeleton
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FIELD = "spec.training.attention"
HEAD_WIDTHS = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")


def of_transformers(config: PreTrainedConfig, task: str) -> str:
    """Return the implementation that transformers takes for the model unless it is told: sdpa, or eager."""
    return str(skeleton(config, task, MODEL).config._attn_implementation)


def cannot_varlen(config: PreTrainedConfig, task: str) -> str | None:
    """Return why packed rows of the model cannot be computed by `models.varlen`, or None if they can.

    A small model of the same kind is asked for the logits of documents in a row, by both implementations: they are the
    same only where each layer passes on where documents begin, and its windows.
    """
    from luthier_trainer.models import varlen

    kind, widest = config.model_type, widest_head(config)
    if widest > varlen.WIDEST_HEAD:
        return f"{kind} has heads of attention of {widest} numbers, and FlashAttention has at most {varlen.WIDEST_HEAD}"
    varlen.register()
    model = isolation.small_model(config, task)
    expected = isolation.logits(model, isolation.DOCUMENTS)
    beside = documents([[len(document) for document in isolation.DOCUMENTS]])
    try:
        model.set_attn_implementation(varlen.NAME)
        if model.config._attn_implementation != varlen.NAME:
            return f"{kind} has an attention of its own"
        found = isolation.logits(model, isolation.DOCUMENTS, **beside)
        # Only in training some models drop weights of attention.
        isolation.logits(model.train(), isolation.DOCUMENTS, **beside)
    except Exception as error:  # each architecture fails in its own way
        return f"{kind} cannot: {' '.join(str(error).split())[:200]}"
    moved = float(((found - expected).abs().max() / expected.std()).nan_to_num(float("inf")))
    if moved > isolation.LIMIT:
        return f"{kind} would compute something else: its logits move by {moved:.2g} of their standard deviation"
    return None


def documents(lengths: list[list[int]], length: int | None = None) -> dict[str, Any]:
    """Return the inputs of a model that tell where documents begin, by the names of transformers.

    `lengths`: of the documents of each row. `length`: of the rows with their padding, which becomes documents, too.
    """
    import torch

    of_all: list[int] = []
    for row in lengths:
        of_all += row
        if length is not None and sum(row) < length:
            of_all.append(length - sum(row))
    begins = torch.tensor([0, *of_all], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(of_all)
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}


def widest_head(config: PreTrainedConfig) -> int:
    """Return the numbers of the widest head of attention."""
    text = config.get_text_config()
    widths = [getattr(text, name, None) or 0 for name in HEAD_WIDTHS]
    if not any(widths):
        widths = [(getattr(text, "hidden_size", None) or 0) // (getattr(text, "num_attention_heads", None) or 1)]
    return max(widths)


def check(config: PreTrainedConfig, task: str, asked: AttentionName, trouble: str | None) -> None:
    """Check the implementation that the job asks for. `trouble`: why varlen cannot compute the model's packed rows.

    Raises Failure if the image does not have it, or if the model does not work with it.
    """
    if asked == "auto":
        return
    info = ATTENTIONS[asked]
    if info.package and importlib.util.find_spec(info.package) is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: {asked} is in the package {info.package}, which this image does not have; use auto, or an image"
            " with that package",
        )
    if asked == "varlen":
        if trouble:
            raise Failure(ExitCode.INVALID_SPEC, f"{FIELD}: varlen: {trouble}; use auto")
        return
    import torch

    try:
        with torch.device("meta"):
            model = auto_class(task).from_config(copy.deepcopy(config), attn_implementation=asked)
    except (ValueError, ImportError) as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{FIELD}: {' '.join(str(error).split())[:300]}; use auto") from error
    if model.config._attn_implementation != asked:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: transformers computes {config.model_type} with {model.config._attn_implementation} where {asked}"
            " is asked for; use auto",
        )
