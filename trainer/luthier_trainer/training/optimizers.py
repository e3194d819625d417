"""The optimisers of `luthier_api.optimizers` as transformers and torch have them.

Most are made by transformers' Trainer from its arguments (`arguments`); `own` makes the others. An optimiser that
cannot leave out an update by itself gets a `step` that can (`withholding`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer

from luthier_api.training import Training
from luthier_trainer.models.heads import heads_of, hidden_matrices


def arguments(training: Training) -> dict[str, Any]:
    """Return the arguments of transformers' `TrainingArguments` that choose the optimiser."""
    options = training.optimizer_options
    adam = {"adam_beta1": options.beta1, "adam_beta2": options.beta2, "adam_epsilon": options.epsilon}
    # The Trainer is given Muon as an object. It asks for no other optimizer then.
    name = "adamw_torch_fused" if training.optimizer == "muon" else training.optimizer
    return {"optim": name} | {key: value for key, value in adam.items() if value is not None}


def replaced_by(strategy: str) -> str:
    """Return the part of a line that names the optimiser by which accelerate replaces that of the job, if it does."""
    return ", AdamW on the CPU by DeepSpeedCPUAdam" if strategy.endswith("-offload") else ""


class Withholding(torch.optim.Optimizer):
    """A mixin before an optimiser's class: while `withheld` is true, `step` changes nothing."""

    withheld = False

    def step(self, closure: Any = None) -> Any:
        return None if self.withheld else super().step(closure)


def withholding(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give `optimizer` the mixin, and return it. Fused optimisers have `found_inf` instead, and stay as they are."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        kind = type(optimizer)
        optimizer.__class__ = type(kind.__name__, (Withholding, kind), {})
    return optimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some weights and fused AdamW for the others, as one optimiser with one state."""

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], lr: float, options: Any) -> None:
        """`matrices`, `others`: groups of parameters with their weight decay. `options`: `OptimizerOptions`."""
        # The scale makes an update as large as one of AdamW (arXiv:2502.16982).
        self._muon = torch.optim.Muon(matrices, lr=lr, momentum=options.momentum, adjust_lr_fn="match_rms_adamw")
        betas = (options.beta1, options.beta2)
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=options.epsilon, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both see the groups and the state of this object, which a schedule changes and a checkpoint holds."""
        first = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:first], self.param_groups[first:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        self._muon.step(closure)
        self._adamw.step()


def own(trainer: Any, training: Training, task: str) -> torch.optim.Optimizer | None:
    """Return the optimiser for the weights of `trainer`; None if transformers makes it."""
    if training.parameter_precision == "bf16":
        return stochastic(trainer, training)
    if training.optimizer == "muon":
        return muon(trainer, training, task)
    if training.optimizer_options.loraplus_lr_ratio is not None:
        return lora_plus(trainer, training)
    return None


def stochastic(trainer: Any, training: Training) -> torch.optim.Optimizer:
    """Return the optimiser for weights in bf16, which rounds at random, with transformers' groups and arguments."""
    from luthier_trainer.training import stochastic_rounding

    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    learning = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in learning if name in decayed], "weight_decay": training.weight_decay},
        {"params": [weight for name, weight in learning if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw_torch_fused":
        return stochastic_rounding.AdamW(groups, options["lr"], options["betas"], options["eps"], training.seed)
    in_32_bits_for_embeddings(trainer.model)
    return stochastic_rounding.rounding(kind)(groups, seed=training.seed, **options)


def in_32_bits_for_embeddings(model: torch.nn.Module) -> None:
    """Let bitsandbytes keep the state of embeddings in 32 bits, as transformers does."""
    import bitsandbytes  # here, because it brings torch's compiler, which makes each start slower

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def lora_plus(trainer: Any, training: Training) -> torch.optim.Optimizer:
    """Return the optimiser with PEFT's groups for LoRA+: B and all vectors learn faster than A and whole modules."""
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    optimizer = create_loraplus_optimizer(
        trainer.model,
        kind,
        loraplus_lr_ratio=training.optimizer_options.loraplus_lr_ratio,
        loraplus_weight_decay=training.weight_decay,
        # PEFT's default for adapters of embeddings, 1e-6 whatever the learning rate is, would be silent.
        loraplus_lr_embedding=training.learning_rate,
        **options,
    )
    if options.get("optim_bits") == 8:
        in_32_bits_for_embeddings(trainer.model)  # PEFT 0.21 knows bitsandbytes' classes of other names
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def muon(trainer: Any, training: Training, task: str) -> MuonWithAdamW:
    """Return the optimiser for the weights of `trainer`: Muon for matrices of hidden layers, AdamW for all others.

    Weight decay is for those weights that transformers decays.
    """
    learning = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    matrices = hidden_matrices(trainer.model, heads_of(trainer.model, task)) & learning.keys()
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    others = learning.keys() - matrices

    def group(names: Collection[str], decay: float) -> dict[str, Any]:
        return {"params": [learning[name] for name in learning if name in names], "weight_decay": decay}

    return MuonWithAdamW(
        [group(matrices, training.weight_decay)],
        [group(others & decayed, training.weight_decay), group(others - decayed, 0.0)],
        training.learning_rate,
        training.optimizer_options,
    )
