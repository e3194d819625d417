"""What the tasks have in common that give a row one of several labels: the head, the loss, the figures.

The head is new when the model comes without one, or with one for other labels; a head for the same labels is kept, its
rows in our order. Neighbours: `text_classification` and `image_classification`, whose rows differ.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, EvalPrediction, PreTrainedModel
from transformers.integrations import deepspeed as zero

from luthier_api.exitcodes import ExitCode
from luthier_trainer.ending import Failure
from luthier_trainer.zero3 import left_out, weights_of_other_shape

# What transformers' architectures call the modules behind the encoder, of which only the last knows how many labels
# there are.
HEADS = ("classifier", "score", "classification_head", "pre_classifier", "logits_proj")
ZERO3 = "_hf_deepspeed_config_weak_ref"  # where transformers 5.23 remembers that models are to be spread
SHOWN = 5  # labels in a notice


class Classification:
    auto: Any
    """transformers' class that finds the model's."""

    def load_model(self, path: str, labels: list[str] | None, **options: Any) -> tuple[PreTrainedModel, list[str]]:
        names = labels or []
        options |= {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
        quantization = options.get("quantization_config")
        if quantization:
            quantization.llm_int8_skip_modules = list(HEADS)
        model, missing, mismatched = self._load(path, options)
        whole = whole_modules(model, missing | mismatched)
        if quantization and (quantized := set(whole) - set(HEADS)):
            # New weights are trained whole, which 4-bit ones cannot be. Which they are (a pooler, say) is known only
            # after loading.
            quantization.llm_int8_skip_modules += sorted(quantized)
            model, missing, mismatched = self._load(path, options)
        fit_head(model, missing, labels_in(path), names)
        return model, whole

    def _load(self, path: str, options: dict[str, Any]) -> tuple[PreTrainedModel, set[str], set[str]]:
        """The model, the names of weights that its folder lacks, and of those that it has in another shape.

        `ignore_mismatched_sizes` is meant for the head alone, and transformers applies it to every weight. Raises
        Failure for another one.
        """
        left: set[str] = set()
        if zero.is_deepspeed_zero3_enabled():
            left = weights_of_other_shape(Path(path), self._shapes(path, options["num_labels"]))
            options = options | ({"key_mapping": left_out(left)} if left else {})
        model, loaded = self.auto.from_pretrained(path, output_loading_info=True, **options)
        mismatched = left | {key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]}
        if mismatched and (others := sorted(mismatched - head_weights(model).keys())):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.model: {path} has {', '.join(others[:SHOWN])} in another shape than its config.json says. Copy"
                " the files that belong together",
            )
        return model, set(loaded["missing_keys"]) - left, mismatched

    def _shapes(self, path: str, labels: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of the model in folder `path`, if it had so many labels."""
        with unsharded(), torch.device("meta"):
            model = self.auto.from_config(AutoConfig.from_pretrained(path, num_labels=labels))
        return {name: tuple(weight.shape) for name, weight in model.named_parameters()}

    def loss(self, model: PreTrainedModel) -> Any:
        # no classifier of transformers 5.23 divides by the step's rows, and most take the keyword that asks for it
        return row_loss

    def figures(self) -> LabelFigures:
        return LabelFigures()


def row_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of each row's label (nats), over the rows of the step."""
    losses = cross_entropy(outputs.logits.float(), labels, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def labels_in(path: str) -> list[str]:
    """The labels that a model's configuration names, by id; `LABEL_0` and so on where it names none."""
    return [name for _, name in sorted((AutoConfig.from_pretrained(path).id2label or {}).items())]


def head_weights(model: PreTrainedModel) -> dict[str, int]:
    """Names of the weights that have a row for each label, and which of their dimensions the labels are. Some models
    have two heads.
    """
    few, more = (shapes(model, labels) for labels in (3, 5))
    differing = {name: [a != b for a, b in zip(shape, more.get(name, ()), strict=False)] for name, shape in few.items()}
    return {name: differs.index(True) for name, differs in differing.items() if True in differs}


def shapes(model: PreTrainedModel, labels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that such a model would have for so many labels."""
    return {name: tuple(p.shape) for name, p in twin(model, num_labels=labels).named_parameters()}


def twin(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Such a model on the meta device, with other `settings` in its configuration: without memory, and whole where
    ZeRO-3 has spread it.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with unsharded(), torch.device("meta"):
        return type(model)(config)


@contextmanager
def unsharded() -> Iterator[None]:
    """Models that are made inside are whole: under ZeRO-3 transformers would spread those that are made of models, also
    without memory.
    """
    zero3, zero.__dict__[ZERO3] = zero.__dict__[ZERO3], None
    try:
        yield
    finally:
        zero.__dict__[ZERO3] = zero3


def fit_head(model: PreTrainedModel, missing: set[str], held: list[str], wanted: list[str]) -> None:
    """Make the rows of a head that was made for the labels `held` those of `wanted`: in their order, or new where the
    labels are others.

    `describe_head` says what will happen, in `prepare`.
    """
    kept = {name: dimension for name, dimension in head_weights(model).items() if name not in missing}
    if held == wanted or not kept:
        return
    order = head_order(held, wanted)
    weights = {name: model.get_parameter(name) for name in kept}
    with gathered(list(weights.values())), torch.no_grad():
        if order:
            for name, weight in weights.items():
                weight.copy_(weight.index_select(kept[name], torch.tensor(order, device=weight.device)))
        else:
            for module in sorted({name.rpartition(".")[0] for name in kept}):
                model.get_submodule(module).reset_parameters()


def head_order(held: list[str], wanted: list[str]) -> list[int] | None:
    """For each label of `wanted`, the row of a head for the labels `held` that is its; None where the head is for other
    labels.

    A head whose labels have no names (LABEL_0, LABEL_1, ...) fits rows whose labels are as many numbers from 0.
    """
    if sorted(held) == sorted(wanted):
        return [held.index(name) for name in wanted]
    if are_unnamed(held) and are_numbers(wanted) and len(held) == len(wanted):
        return [int(name) for name in wanted]
    return None


def are_unnamed(labels: list[str]) -> bool:
    return labels == [f"LABEL_{i}" for i in range(len(labels))]


def are_numbers(labels: list[str]) -> bool:
    return sorted(labels) == sorted(str(i) for i in range(len(labels)))


def describe_head(model: PreTrainedModel, there: Collection[str], held: list[str], wanted: list[str]) -> str:
    """What becomes of the head of a model for the labels `held` when it is trained for `wanted`. `there`: the names of
    the weights in its files.
    """
    new = f"a new one for {shown(wanted)} begins with random weights"
    if not any(name in there for name in head_weights(model)):
        return f"it has no head for labels; {new}"
    order = head_order(held, wanted)
    if order is None:
        hint = ""
        if len(held) == len(wanted) and are_unnamed(held):
            hint = (
                f". If {held[0]} is {wanted[0]}, and so on, name them so under id2label in its config.json, and it is"
                " kept"
            )
        elif len(held) == len(wanted) and are_numbers(wanted):
            hint = f". If 0 is {held[0]}, and so on, write these names into the rows, and it is kept"
        return f"its head is for other labels ({shown(held)}); {new}{hint}"
    if are_unnamed(held) and held != wanted:
        return f"its head names no labels and is kept: {held[0]} is 0, and so on"
    if held != wanted:
        return f"its head knows the labels in another order ({shown(held)}) and is put into ours ({shown(wanted)})"
    return f"its head is for the same labels ({shown(held)}) and is kept"


def shown(labels: list[str]) -> str:
    return ", ".join(labels[:SHOWN]) + ", ..." * (len(labels) > SHOWN)


def gathered(parameters: list[torch.nn.Parameter]) -> Any:
    """Whole weights inside, where ZeRO-3 has spread them over the processes; what the first one makes of them is
    everybody's.
    """
    if not zero.is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def whole_modules(model: PreTrainedModel, new_weights: set[str]) -> list[str]:
    """Modules that adapters must not touch: the head, and what else has no pretrained weights. Only the outermost of
    nested ones.
    """
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS}
    names |= {weight.rpartition(".")[0] for weight in new_weights | head_weights(model).keys()}
    return sorted(name for name in names if name and not any(name.startswith(f"{other}.") for other in names))


class LabelFigures:
    """evalLoss, accuracy, f1Macro, and majorityShare: the accuracy of always answering the commonest label.

    f1Macro is the mean over all labels of the training. A label that the held-out rows do not have counts as 0, so that
    the figure does not grow because a rare label is missing from them.
    """

    def __init__(self) -> None:
        self.loss, self.answers, self.truth, self.labels = 0.0, list[int](), list[int](), 0

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits [rows, labels] → [rows, 2]: loss and answer of each row."""
        self.labels = logits.shape[1]
        losses = cross_entropy(logits.float(), labels, reduction="none")
        return torch.stack([losses.double(), logits.argmax(dim=1).double()], dim=1)

    def __call__(self, gathered: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self.loss += gathered.predictions[:, 0].sum().item()
        self.answers += gathered.predictions[:, 1].long().tolist()
        self.truth += gathered.label_ids.tolist()
        if not compute_result:
            return {}
        from sklearn.metrics import accuracy_score, f1_score  # 0.4 s that every start of every task would pay

        rows = len(self.truth)
        figures = {
            "loss": self.loss / rows,
            "accuracy": float(accuracy_score(self.truth, self.answers)),
            "f1Macro": float(
                f1_score(self.truth, self.answers, labels=range(self.labels), average="macro", zero_division=0)
            ),
            "majorityShare": max(self.truth.count(label) for label in set(self.truth)) / rows,
        }
        self.__init__()  # type: ignore[misc]  # the next evaluation begins at nothing
        return figures
