"""Names that modules had before transformers 5, wherever a method names modules.

The present names are those of the model that is made here; which old name is which, the table of transformers says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases.methods import method_of
from transformers import ViTConfig, ViTForImageClassification

from luthier_trainer.methods import frozen, whole
from luthier_trainer.methods.apply import with_method
from luthier_trainer.models.inspect import skeleton
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure

TASK = "image-classification"
CONFIG = ViTConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
BLOCKS = "vit.layers"


@dataclass(frozen=True)
class Case:
    name: str
    asked: str
    meant: tuple[str, ...]
    """Whole names of the modules."""
    told: str
    """What the notice says of the name."""


CASES = [
    Case(
        name="the end of a name",
        asked="query",
        meant=(f"{BLOCKS}.0.attention.q_proj", f"{BLOCKS}.1.attention.q_proj"),
        told="query is called q_proj",
    ),
    Case(
        name="a whole layer",
        asked="encoder.layer.1",
        meant=(f"{BLOCKS}.1",),
        told="encoder.layer.1 is called layers.1",
    ),
    Case(
        name="a layer, without what it is in",
        asked="layer.0",
        meant=(f"{BLOCKS}.0",),
        told="layer.0 is called layers.0",
    ),
    Case(
        name="a module of a layer",
        asked="vit.encoder.layer.1.attention.output.dense",
        meant=(f"{BLOCKS}.1.attention.o_proj",),
        told="vit.encoder.layer.1.attention.output.dense is called vit.layers.1.attention.o_proj",
    ),
]


def inside(names: Any, modules: tuple[str, ...]) -> set[str]:
    return {name for name in names if any(name.startswith(f"{module}.") for module in modules)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_frozen_module_by_an_old_name(case: Case) -> None:
    method = method_of(type="full", freeze=[case.asked])
    frozen.check(CONFIG, TASK, method)
    model = ViTForImageClassification(CONFIG)
    frozen.apply(model, method, [])
    weights = dict(model.named_parameters())
    assert (
        {name for name, weight in weights.items() if not weight.requires_grad} == inside(weights, case.meant) != set()
    )
    assert notices.given() == [f"spec.method.freeze: {case.told} in vit since transformers 5; these were taken"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_module_that_is_trained_whole_by_an_old_name(case: Case) -> None:
    method = method_of(type="lora", modulesToSave=[case.asked], targetModules=["fc1"])
    whole.check(CONFIG, TASK, method, quantised=False)
    model = ViTForImageClassification(CONFIG)
    names = {name for name, _ in model.named_parameters()}
    adapted = with_method(model, method, None, [], deepspeed=False)
    learns = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, weight in adapted.named_parameters()
        if weight.requires_grad and "lora_" not in name
    }
    assert learns == inside(names, case.meant) != set()
    assert notices.given() == [f"spec.method.modulesToSave: {case.told} in vit since transformers 5; these were taken"]


@pytest.mark.parametrize("field", ["freeze", "modulesToSave"])
def test_what_is_no_old_name_either_is_refused(field: str) -> None:
    check: Any = frozen.check if field == "freeze" else lambda *given: whole.check(*given, quantised=False)
    kind = "full" if field == "freeze" else "lora"
    with pytest.raises(Failure, match=rf"^spec\.method\.{field}\[0\]: the model has no module"):
        check(CONFIG, TASK, method_of(type=kind, **{field: ["encoder.block.0"]}))


def test_a_module_gets_either_an_adapter_or_is_trained_whole() -> None:
    """Also if it is named once by its old name and once by its present one."""
    method = method_of(type="lora", modulesToSave=["query"], targetModules=["q_proj", "v_proj"])
    with pytest.raises(Failure, match=r"^spec\.method\.modulesToSave\[0\]: 'query' is in targetModules, too"):
        whole.check(CONFIG, TASK, method, quantised=False)


def test_names_that_are_there_stay() -> None:
    model = skeleton(CONFIG, TASK, "")
    assert isinstance(model.get_submodule(f"{BLOCKS}.0.attention.q_proj"), torch.nn.Linear)
    frozen.check(CONFIG, TASK, method_of(type="full", freeze=["layers.0"]))
    assert notices.given() == []
