"""LoftQ (`method.initLoraWeights: loftq`, arXiv:2310.08659): adapters begin as what quantising the base has lost.

This is the form with one iteration: the base is what bitsandbytes makes of it, and s B A is the best approximation of
W - Q of the adapter's rank, where W is the weight in the files, Q the quantised one and s the adapter's scale. PEFT's
`replace_lora_weights_loftq` (0.21) needs CUDA and forgets s. Such an adapter belongs to the base in that type alone:
on the plain base it would add the error of the quantisation. Its configuration says so (`models.quantised_base`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.models import weight_files
from luthier_trainer.models.inspect import MODEL, skeleton
from luthier_trainer.models.quantised_base import ARGUMENTS, DTYPE, LOFTQ, SETTINGS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FIELD = "spec.method.initLoraWeights"
KEPT = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
ERROR = 0.5  # of the norm; types of 4 bits lose about 0.1
BOUND = (
    "The result of initLoraWeights: loftq is an adapter for its base in {kind} alone. model.job of other jobs merges it"
    " into the weights in {kind}; adapters of a GenerateJob refuse it, and vLLM needs the base in this type"
)


class Source:
    """The weights of linear modules as they are in the files of the base, read one at a time."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """`prefix`: transformers' name of the model without its head, which names in files may have or lack."""
        self._files = {
            name: (file, tuple(tensor["shape"]))
            for file in weight_files.loaded(folder, MODEL)
            for name, tensor in weight_files.header_of(file).items()
            if name != weight_files.METADATA
        }
        self._prefix = f"{prefix}." if prefix else ""

    def name(self, module: str) -> str | None:
        """Return the name in the files of the weight of `module`; None if they have none for it."""
        names = [f"{module}.weight"]
        if self._prefix:
            names += [names[0].removeprefix(self._prefix), self._prefix + names[0]]
        return next((name for name in names if name in self._files), None)

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Return the shape of the weight of `module` in the files; None if they have none for it."""
        name = self.name(module)
        return self._files[name][1] if name else None

    def weight(self, module: str) -> torch.Tensor:
        """Return the weight of `module` in fp32, [outputs, inputs]. `check` has found it there."""
        import torch
        from safetensors import safe_open

        name = self.name(module)
        assert name is not None, module
        with safe_open(self._files[name][0], "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found.to(torch.float32)


def check(folder: Path, config: PreTrainedConfig, task: str, spec: FineTuneJobSpec) -> None:
    """Check that the files in `folder` have the weights before they are quantised, and say what the result is for.

    Raises Failure if they have not.
    """
    from luthier_trainer.methods.trainable import adapted_modules
    from luthier_trainer.methods.whole import whole_modules
    from luthier_trainer.models.heads import heads_of

    method, quantization = spec.method, spec.model.quantization
    if method.init_lora_weights != LOFTQ or quantization is None:
        return
    if getattr(config, "quantization_config", None):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: the weights of the model came quantised, and loftq learns from those before; choose the"
            " unquantised model, or gaussian",
        )
    model = skeleton(config, task, MODEL)
    source = Source(folder, model.base_model_prefix)
    for name in adapted_modules(model, method, whole_modules(model, method, heads_of(model, task))):
        wanted = tuple(model.get_submodule(name).weight.shape)
        if source.shape(name) != wanted:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FIELD}: loftq reads the weights before they are quantised, and the files of the model have no"
                f" {name}.weight of the shape {' × '.join(map(str, wanted))}, because transformers makes it of others;"
                " use gaussian, or remove it from targetModules",
            )
    notice(f"{FIELD}: {BOUND.format(kind=quantization.type)}")


def beginning(layer: Any, weight: torch.Tensor, adapter: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B with which a quantised layer is nearest to `weight`, on the CPU in fp32.

    `weight`: on the device where singular vectors are computed. Raises Failure if the layer was not made of `weight`.
    """
    import torch
    from peft.utils.integrations import dequantize_bnb_weight

    quantised = dequantize_bnb_weight(layer.get_base_layer().weight).to(weight)
    lost = weight - quantised
    if lost.norm() > ERROR * weight.norm():
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}: {name} is not what the files of the model have under this name, because transformers changes it"
            " on loading; use gaussian, or remove it from targetModules",
        )
    left, values, right = torch.linalg.svd(lost, full_matrices=False)
    rank, scale = layer.r[adapter], layer.scaling[adapter]
    roots = (values[:rank] / scale).sqrt()
    first, second = roots[:, None] * right[:rank], left[:, :rank] * roots
    return first.cpu().contiguous(), second.cpu().contiguous()


def write_settings(folder: Path, model: Any) -> None:
    """Write into the configuration of the adapter in `folder` how the base of `model` has to be loaded."""
    from bitsandbytes.nn import Linear4bit

    path = folder / ADAPTER_CONFIG
    given = model.config.quantization_config
    stated = given if isinstance(given, dict) else given.to_dict()
    quantization = {name: stated[name] for name in KEPT}
    # What is left out is not the same: transformers then chooses modules, such as lm_head.
    if skipped := stated.get("llm_int8_skip_modules"):
        quantization["llm_int8_skip_modules"] = skipped
    dtype = next(m.weight.quant_state.dtype for m in model.modules() if isinstance(m, Linear4bit))
    settings = {
        "loftq_bits": 4,
        "loftq_iter": 1,
        ARGUMENTS: quantization,
        DTYPE: str(dtype).removeprefix("torch."),
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {SETTINGS: settings}, indent=2, sort_keys=True))
