"""The implementation of each method of `luthier_api.methods` that makes adapters. Imports neither torch nor PEFT."""

from __future__ import annotations

from collections.abc import Mapping

from luthier_api.methods import MethodType
from luthier_trainer.methods.base import AdapterFamily
from luthier_trainer.methods.lora import Lora

FAMILIES: Mapping[MethodType, AdapterFamily] = {
    "lora": Lora(),
    "qlora": Lora(),
}
"""Method → its adapters. Methods that are not in this table train the weights of the model itself."""
