"""The implementation of each method of `luthier_api.methods` that makes adapters. Imports neither torch nor PEFT."""

from __future__ import annotations

from collections.abc import Mapping

from luthier_api.methods import MethodType
from luthier_trainer.methods.adalora import AdaLora
from luthier_trainer.methods.base import AdapterFamily
from luthier_trainer.methods.ia3 import Ia3
from luthier_trainer.methods.lora import Lora
from luthier_trainer.methods.prompts import Prefix, Prompt, PTuning

FAMILIES: Mapping[MethodType, AdapterFamily] = {
    "lora": Lora(),
    "qlora": Lora(),
    "adalora": AdaLora(),
    "ia3": Ia3(),
    "prompt": Prompt(),
    "p-tuning": PTuning(),
    "prefix": Prefix(),
}
"""Method → its adapters. Methods that are not in this table train weights of the model itself (`frozen`)."""
