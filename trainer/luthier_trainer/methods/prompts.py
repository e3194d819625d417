"""Prompt tuning, p-tuning and prefix tuning: what learns stands before each text, and the model stays as it is.

prompt (arXiv:2104.08691) learns the embeddings of virtual tokens; p-tuning (arXiv:2103.10385) a small network that
makes them; prefix (arXiv:2101.00190) keys and values for every layer, or a network that makes these.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from luthier_api.method import Method
from luthier_trainer.methods.base import AdapterFamily, Surroundings
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import torch
    from peft import PromptLearningConfig

ADAPTER = "default"  # PEFT's name of the only adapter
IGNORED = -100  # the label that all losses of transformers ignore
ENCODER_LAYERS = 2  # of the LSTM of p-tuning, PEFT's default


class VirtualTokens(AdapterFamily):
    """Methods that learn what stands before a text."""

    saves_all = True  # PEFT saves what the networks make, and not the networks

    def config(self, method: Method, around: Surroundings) -> PromptLearningConfig:
        config = self.own_config(method)
        config.task_type = around.task_type
        config.modules_to_save = around.whole or None
        return config

    @abstractmethod
    def own_config(self, method: Method) -> PromptLearningConfig:
        """Return PEFT's configuration, without what depends on the task."""

    def beside(self, method: Method, model: Any, task_type: str | None) -> list[tuple[int, ...]]:
        from peft.utils.other import _prepare_prompt_learning_config

        config = _prepare_prompt_learning_config(self.own_config(method), model.config)
        submodules = 2 if task_type == "SEQ_2_SEQ_LM" else 1  # encoder and decoder get their own
        return self.encoder_shapes(method, config, submodules)

    @abstractmethod
    def encoder_shapes(self, method: Method, config: Any, submodules: int) -> list[tuple[int, ...]]:
        """Return the shape of each tensor that learns. `config`: PEFT's, with the sizes of the model."""

    def begin(self, adapted: Any, method: Method, tokenizer: Any) -> None:
        adapted.register_forward_pre_hook(without_first_label, with_kwargs=True)


class Prompt(VirtualTokens):
    """Embeddings of `method.virtualTokens` virtual tokens."""

    def own_config(self, method: Method) -> PromptLearningConfig:
        from peft import PromptTuningConfig

        return PromptTuningConfig(num_virtual_tokens=method.virtual_tokens)

    def encoder_shapes(self, method: Method, config: Any, submodules: int) -> list[tuple[int, ...]]:
        return [(submodules * method.virtual_tokens, config.token_dim)]

    def begin(self, adapted: Any, method: Method, tokenizer: Any) -> None:
        import torch

        super().begin(adapted, method, tokenizer)
        rows = adapted.prompt_encoder[ADAPTER].embedding.weight
        ids = first_tokens(method, tokenizer, len(rows), adapted.word_embeddings.weight.shape[0])
        if ids is not None:
            with torch.no_grad():
                rows.copy_(adapted.word_embeddings(ids.to(rows.device)))


class PTuning(VirtualTokens):
    """A network that makes the embeddings of `method.virtualTokens` virtual tokens."""

    def own_config(self, method: Method) -> PromptLearningConfig:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            num_virtual_tokens=method.virtual_tokens,
            encoder_reparameterization_type=method.encoder.upper(),
            encoder_hidden_size=method.encoder_hidden_size,
            encoder_num_layers=ENCODER_LAYERS,
        )

    def encoder_shapes(self, method: Method, config: Any, submodules: int) -> list[tuple[int, ...]]:
        width, hidden = config.token_dim, config.encoder_hidden_size
        table = (submodules * method.virtual_tokens, width)
        if method.encoder == "mlp":
            return [table, *linear(width, hidden), *linear(hidden, hidden), *linear(hidden, width)]
        assert method.encoder == "lstm"
        gates = 4 * hidden
        both_ways = [
            shape
            for inputs in (width, *[2 * hidden] * (ENCODER_LAYERS - 1))
            for shape in [(gates, inputs), (gates, hidden), (gates,), (gates,)] * 2
        ]
        return [table, *both_ways, *linear(2 * hidden, 2 * hidden), *linear(2 * hidden, width)]


class Prefix(VirtualTokens):
    """Keys and values of `method.virtualTokens` virtual tokens in every layer."""

    def own_config(self, method: Method) -> PromptLearningConfig:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=method.virtual_tokens,
            prefix_projection=method.projection,
            encoder_hidden_size=method.encoder_hidden_size,
        )

    def encoder_shapes(self, method: Method, config: Any, submodules: int) -> list[tuple[int, ...]]:
        made = config.num_layers * 2 * config.token_dim
        if not method.projection:
            return [(method.virtual_tokens, made)]
        hidden = config.encoder_hidden_size
        return [
            (method.virtual_tokens, config.token_dim),
            *linear(config.token_dim, hidden),
            *linear(hidden, made),
        ]

    def begin(self, adapted: Any, method: Method, tokenizer: Any) -> None:
        """Begin with the keys and values that the model itself has for tokens, if its task is to continue them."""
        super().begin(adapted, method, tokenizer)
        if method.projection or adapted.active_peft_config.task_type != "CAUSAL_LM":
            if method.prompt_init != "random":
                notice(
                    "spec.method.promptInit: the prefix begins with random numbers, because"
                    f" {'with projection a network makes it' if method.projection else 'this task keeps no cache'}"
                )
            return
        from peft import initialize_kv_prefix_from_past_key_values

        base = adapted.get_base_model()
        table = base.get_input_embeddings().weight
        ids = first_tokens(method, tokenizer, method.virtual_tokens, table.shape[0])
        if ids is None:
            return
        import torch

        training = base.training
        with torch.no_grad():
            cache = base.eval()(input_ids=ids[None].to(table.device), use_cache=True).past_key_values
        base.train(training)
        initialize_kv_prefix_from_past_key_values(adapted, past_key_values=cache)


def without_first_label(model: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Ignore the label of the first token of each row, which no other method predicts, and which is not counted.

    With PEFT the last virtual token predicts it.
    """
    labels = options.get("labels")
    if labels is None or model.active_peft_config.task_type != "CAUSAL_LM":
        return args, options
    labels = labels.clone()
    labels[:, 0] = IGNORED
    return args, options | {"labels": labels}


def linear(inputs: int, outputs: int) -> list[tuple[int, ...]]:
    """Return the shapes of a linear layer with a bias."""
    return [(outputs, inputs), (outputs,)]


def first_tokens(method: Method, tokenizer: Any, count: int, vocabulary: int) -> torch.Tensor | None:
    """Return the tokens that virtual tokens begin as, int64 [count]; None if they begin as random numbers."""
    import torch

    if method.prompt_init == "random":
        return None
    if not method.prompt_text:
        return torch.randint(0, vocabulary, (count,))
    ids = tokenizer(method.prompt_text)["input_ids"]
    return torch.tensor((ids * math.ceil(count / len(ids)))[:count])
