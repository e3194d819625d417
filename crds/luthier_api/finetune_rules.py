"""The rules between the fields of a FineTuneJob: what works together.

Most are drawn from the tables. Rules of one block of fields stand at its type.
"""

from __future__ import annotations

from typing import get_args

from luthier_api.attention import ATTENTIONS
from luthier_api.base import Rule
from luthier_api.classification import of_problems
from luthier_api.dataset import STREAMS
from luthier_api.formats import DatasetFormat
from luthier_api.forms import LOSSES_OF_FORMS, LossOn
from luthier_api.marks import works_with
from luthier_api.methods import METHODS, PACKINGS, QUANTIZATIONS, STRATEGIES, ParameterPrecision
from luthier_api.optimizers import OPTIMIZERS
from luthier_api.schedules import SCHEDULES
from luthier_api.spec import alone_on_its_claim
from luthier_api.tasks import BEST_METRICS, EVAL_LOSS, TASKS, TEXT_OPTIONS, TRAINING_TASKS

METHODS_OF_TASKS = {name: task.methods for name, task in TRAINING_TASKS.items()}
FORMATS_OF_TASKS = {name: task.formats for name, task in TRAINING_TASKS.items()}
QUANTIZATIONS_OF_TASKS = {name: task.quantizations for name, task in TRAINING_TASKS.items()}
QUANTIZATIONS_OF_METHODS = {name: method.quantizations for name, method in METHODS.items()}
METRICS_OF_TASKS = {
    name: (EVAL_LOSS, *(metric.name for metric in task.metrics if metric.better))
    for name, task in TRAINING_TASKS.items()
}
STRATEGIES_OF_TASKS = {name: task.strategies for name, task in TRAINING_TASKS.items()}
METHODS_OF_OPTIMIZERS = {name: optimizer.methods for name, optimizer in OPTIMIZERS.items()}
STRATEGIES_OF_OPTIMIZERS = {name: optimizer.strategies for name, optimizer in OPTIMIZERS.items()}
PARAMETERS_OF_OPTIMIZERS = {name: optimizer.parameters for name, optimizer in OPTIMIZERS.items()}
SCHEDULES_OF_OPTIMIZERS = {name: optimizer.schedules for name, optimizer in OPTIMIZERS.items()}
STRATEGIES_OF_METHODS = {name: method.strategies for name, method in METHODS.items()}
STRATEGIES_OF_QUANTIZATIONS = {name: quantization.strategies for name, quantization in QUANTIZATIONS.items()}
PACKINGS_OF_METHODS = {name: method.packings for name, method in METHODS.items()}


def why(what: str) -> dict[str, str]:
    """Method → why its `what` is restricted."""
    return {name: method.why[what] for name, method in METHODS.items() if what in method.why}


WHY_OF_TASKS = {
    what: {name: task.why[what] for name, task in TRAINING_TASKS.items() if what in task.why}
    for what in ("methods", "quantizations", "strategies")
}
WHY_OF_QUANTIZATIONS = {name: quantization.why for name, quantization in QUANTIZATIONS.items()}

COMPUTE_LOGITS = [
    name for name, info in TASKS.items() if info.training and info.auto_model == "CausalLM" and "trl" in info.tags
]
"""Tasks whose trainer computes the logits itself, from the weights of the output layer."""
NO_ROWS_IN_ADAPTER = (
    "self.method.type == 'full' || !(has(self.model.addSpecialTokens) || has(self.model.tokenizer) ||"
    " has(self.model.resizeEmbeddings) && self.model.resizeEmbeddings)"
)
"""CEL: no adapter holds rows of the embedding for new tokens."""


BEGINS_RANDOM = "!has(self.method.initLoraWeights) || self.method.initLoraWeights == 'gaussian'"
"""CEL: the beginning of adapters does not depend on the weights."""
NO_LOFTQ = "!has(self.method.initLoraWeights) || self.method.initLoraWeights != 'loftq'"
"""CEL: adapters do not begin as what quantised weights have lost."""
FOUR_BITS = [name for name, quantization in QUANTIZATIONS.items() if quantization.bits == 4]
IN_FP32 = "!has(self.training.parameterPrecision) || self.training.parameterPrecision == 'fp32'"
"""CEL: the weights that learn rest in fp32."""
ON_GPUS = [name for name, attention in ATTENTIONS.items() if attention.gpu]
OF_PACKED_ROWS = [name for name, attention in ATTENTIONS.items() if attention.packed_only]
IN_16_BITS = [name for name, attention in ATTENTIONS.items() if attention.half]
COMPARED_WITHOUT = [
    name
    for name, task in TRAINING_TASKS.items()
    if "method.initLoraWeights" in task.options and "method.bias" not in task.options
]
"""Tasks that switch the adapter off to make a reference model (see `tasks.SAVED_OPTIONS`)."""

PROCESSES = (
    "self.resources.nodes * (self.resources.gpusPerNode > 0 ? self.resources.gpusPerNode :"
    " (has(self.resources.processesPerNode) ? self.resources.processesPerNode : 1))"
)
"""CEL: the processes of the training."""

WITH_FSDP = (
    (
        "self.resources.gpusPerNode > 0",
        "spec.strategy: fsdp needs GPUs: on CPUs nothing of its exchange overlaps with the computation; use zero3,"
        " which divides the same on CPUs, or ddp",
    ),
    (
        f"{PROCESSES} > 1",
        "spec.strategy: fsdp divides the weights over GPUs, and there is one; raise resources.gpusPerNode or nodes, or"
        " use auto or zero3-offload",
    ),
    (
        "self.training.precision != 'fp16'",
        "spec.training.precision: torch (2.13) scales losses of fp16 without regard to the shards of other GPUs; use"
        " bf16 or fp32 with fsdp, or strategy zero3",
    ),
    (
        "!has(self.training.torchCompile) || !self.training.torchCompile",
        "spec.training.torchCompile: has not been proven with fsdp; use strategy ddp, zero1 or zero2, or remove it",
    ),
    (
        "!has(self.method.dora) || !self.method.dora",
        "spec.method.dora: PEFT (0.21) computes DoRA's magnitudes from whole weights, which fsdp divides; use strategy"
        " zero3 or ddp, or remove dora",
    ),
    (
        f"({NO_ROWS_IN_ADAPTER})",
        "spec.model: an embedding that fsdp divides cannot get rows in an adapter; use method.type: full, or strategy"
        " zero2 or ddp, or remove addSpecialTokens, tokenizer and resizeEmbeddings",
    ),
)
"""Of jobs with strategy fsdp: (CEL, message)."""

RULES: tuple[Rule, ...] = (
    alone_on_its_claim("resources.nodes", "self.resources.nodes == 1"),
    *works_with("task", METHODS_OF_TASKS, "method.type", METHODS, WHY_OF_TASKS["methods"]),
    *works_with("task", FORMATS_OF_TASKS, "dataset.?format", get_args(DatasetFormat)),
    *works_with(
        "task",
        QUANTIZATIONS_OF_TASKS,
        "model.?quantization.type",
        QUANTIZATIONS,
        WHY_OF_TASKS["quantizations"],
    ),
    *works_with("dataset.?form", LOSSES_OF_FORMS, "training.?lossOn", get_args(LossOn)),
    *works_with(
        "method.type", QUANTIZATIONS_OF_METHODS, "model.?quantization.type", QUANTIZATIONS, why("quantizations")
    ),
    *works_with("task", STRATEGIES_OF_TASKS, "strategy", STRATEGIES, WHY_OF_TASKS["strategies"]),
    *works_with("method.type", STRATEGIES_OF_METHODS, "strategy", STRATEGIES, why("strategies")),
    *works_with("model.?quantization.type", STRATEGIES_OF_QUANTIZATIONS, "strategy", STRATEGIES, WHY_OF_QUANTIZATIONS),
    *works_with("method.type", PACKINGS_OF_METHODS, "training.?packing", PACKINGS, why("packings")),
    *(
        Rule(
            "!has(self.training.gradientCheckpointing) || !self.training.gradientCheckpointing ||"
            f" self.method.type != '{name}'",
            f"spec.training.gradientCheckpointing: not with {name}, because {method.why['recomputes']}; remove it, or"
            " choose another method.type",
        )
        for name, method in METHODS.items()
        if not method.recomputes
    ),
    *works_with("task", METRICS_OF_TASKS, "training.?metric", BEST_METRICS),
    Rule(
        "!has(self.image) || !has(self.image.priorLossWeight) || has(self.dataset.columns.prior)",
        "spec.image.priorLossWeight: weighs the images that dataset.columns.prior marks; set that column, or remove it",
    ),
    Rule(
        f"!(self.task in {COMPUTE_LOGITS}) || {NO_ROWS_IN_ADAPTER}",
        "spec.model: TRL (1.16) computes the logits of this task without what an adapter holds of the output layer;"
        " use method.type: full, or add the tokens in a job of task causal-lm and name it in model.job",
    ),
    Rule(
        f"!self.strategy.startsWith('zero3') || {NO_ROWS_IN_ADAPTER}",
        "spec.model: PEFT (0.21) reads the rows of new tokens from an embedding that ZeRO-3 divides in a way that"
        " has not been proven; use strategy zero2 or ddp, or remove addSpecialTokens, tokenizer and resizeEmbeddings",
    ),
    Rule(
        "!has(self.method.bias) || self.method.bias == 'none' || self.method.type != 'qlora' &&"
        " !has(self.model.quantization)",
        "spec.method.bias: bitsandbytes (0.50) rounds the biases of quantised modules to 16 bits in each step, in"
        " which small updates are lost; use method.type: lora without model.quantization, or remove bias",
    ),
    Rule(
        f"{BEGINS_RANDOM} || self.method.initLoraWeights == 'loftq' || self.method.type != 'qlora' &&"
        " !has(self.model.quantization)",
        "spec.method.initLoraWeights: is computed from weights or in their type, which here are of few bits; use"
        " loftq or gaussian, or method.type: lora without model.quantization",
    ),
    Rule(
        f"{NO_LOFTQ} || self.method.type == 'qlora' || has(self.model.quantization) &&"
        f" self.model.quantization.type in {FOUR_BITS}",
        "spec.method.initLoraWeights: loftq begins as what 4 bits lose of the weights; use method.type: qlora, or"
        f" model.quantization.type: {' or '.join(FOUR_BITS)}, or remove it",
    ),
    Rule(
        f"{NO_LOFTQ} || self.strategy in ['auto', 'ddp']",
        "spec.method.initLoraWeights: loftq has not been proven with DeepSpeed; use strategy auto or ddp",
    ),
    Rule(
        f"{NO_LOFTQ} || !(self.task in {COMPARED_WITHOUT})",
        "spec.method.initLoraWeights: this task switches the adapter off to compare with the model that training"
        " begins from, and with loftq a part of that model is in the adapter; use gaussian, or remove it",
    ),
    Rule(
        f"{BEGINS_RANDOM} || !self.strategy.startsWith('zero3') && self.strategy != 'fsdp'",
        "spec.method.initLoraWeights: ZeRO-3 and FSDP divide the weights from which adapters begin; use gaussian, or"
        " strategy zero2 or ddp",
    ),
    Rule(
        f"{NO_LOFTQ} || !has(self.method.dora) || !self.method.dora",
        "spec.method.dora: PEFT (0.21) computes DoRA's magnitudes before loftq changes what they are norms of;"
        " remove dora, or initLoraWeights",
    ),
    Rule(
        f"{BEGINS_RANDOM} || self.method.initLoraWeights == 'loftq' || !has(self.method.dora) || !self.method.dora",
        "spec.method.initLoraWeights: DoRA divides by a norm of what the adapter has become, beside which its"
        " beginning cannot be subtracted; use gaussian, or remove dora",
    ),
    *of_problems(),
    Rule(
        "self.task != 'speech-recognition' || !has(self.speech) || self.speech.beams > 0 || !has(self.training.metric)"
        f" || self.training.metric == '{EVAL_LOSS}'",
        f"spec.speech.beams: with 0 no texts are written that the metric could rate; use metric: {EVAL_LOSS}, or 1 or"
        " more beams",
    ),
    Rule(
        "self.task != 'seq2seq' || !has(self.seq2seq) || self.seq2seq.beams > 0 || !has(self.training.metric) ||"
        f" self.training.metric == '{EVAL_LOSS}'",
        f"spec.seq2seq.beams: with 0 no texts are written that the metric could rate; use metric: {EVAL_LOSS}, or 1 or"
        " more beams",
    ),
    Rule(
        f"self.task != 'embedding' || self.training.batchSize > {PROCESSES} &&"
        " (!has(self.training.microBatchSize) || self.training.microBatchSize > 1)",
        "spec.training.batchSize: texts are told apart from those of other rows of the same micro-batch, so it needs"
        " two rows at least; raise batchSize or microBatchSize",
    ),
    Rule(
        "self.task != 'grpo' || has(self.grpo) && has(self.grpo.rewards) && size(self.grpo.rewards) > 0",
        "spec.grpo.rewards: the task grpo needs a reward, such as type: exactMatch with column: answer; add one",
    ),
    Rule(
        "self.task != 'grpo' || !has(self.grpo) || !has(self.grpo.rewards) ||"
        " !self.grpo.rewards.exists(r, r.type == 'python') || !has(self.tracking) ||"
        " !self.tracking.exists(t, has(t.secretRef))",
        "spec.tracking.secretRef: the pods of run would hold credentials that the code of a reward of type python"
        " could read; remove secretRef, or that reward",
    ),
    Rule(
        "self.task != 'grpo' || !has(self.grpo) || self.training.batchSize % self.grpo.generations == 0",
        "spec.grpo.generations: training.batchSize counts completions, and must be a multiple of generations",
    ),
    Rule(
        "self.task != 'grpo' || !has(self.grpo) || self.grpo.maxCompletionLength <"
        f" (has(self.training.maxLength) ? self.training.maxLength : {TEXT_OPTIONS['training.maxLength']})",
        "spec.grpo.maxCompletionLength: leaves no room for a prompt; choose less than training.maxLength",
    ),
    *(
        Rule(f"!({STREAMS.format('.dataset')}) || {wanted}", message)
        for wanted, message in (
            (
                "has(self.training.maxSteps)",
                "spec.training.maxSteps: a stream has no known end, so that epochs cannot be counted; set it",
            ),
            (
                "!has(self.training.groupByLength) || !self.training.groupByLength",
                "spec.training.groupByLength: orders the rows of an epoch, and a stream has none; remove it, or use"
                " packing: isolated",
            ),
            (
                "!has(self.training.packing) || self.training.packing != 'concatenate'",
                "spec.training.packing: concatenate joins all rows, which a stream does not know; use isolated",
            ),
            (
                "!has(self.model.config)",
                "spec.model.config: the tokenizer of a new model is made of all rows, which a stream does not know;"
                " name a model by id, path or job, or remove dataset.streaming",
            ),
            (
                "has(self.model.config) || !has(self.model.tokenizer)",
                "spec.model.tokenizer: pieces are learnt from all rows, which a stream does not know; remove it, use"
                " addSpecialTokens for control tokens, or remove dataset.streaming",
            ),
            (
                "self.training.evalEvery == 'steps'",
                "spec.training.evalEvery: a stream has no epochs; use evalSteps",
            ),
            (
                "self.training.saveEvery == 'steps'",
                "spec.training.saveEvery: a stream has no epochs; use saveSteps",
            ),
        )
    ),
    *works_with("training.optimizer", METHODS_OF_OPTIMIZERS, "method.type", METHODS),
    *works_with("training.optimizer", STRATEGIES_OF_OPTIMIZERS, "strategy", STRATEGIES),
    *works_with(
        "training.optimizer", PARAMETERS_OF_OPTIMIZERS, "training.?parameterPrecision", get_args(ParameterPrecision)
    ),
    Rule(
        f"{IN_FP32} || self.strategy in ['auto', 'ddp']",
        "spec.training.parameterPrecision: DeepSpeed and FSDP keep the weights in fp32, divided over the GPUs; use"
        " strategy auto or ddp, or remove it",
    ),
    Rule(
        f"{IN_FP32} || self.training.precision == 'bf16' ||"
        " self.training.precision == 'auto' && self.resources.gpusPerNode > 0",
        "spec.training.parameterPrecision: bf16 needs a computation in bf16; set precision: bf16",
    ),
    Rule(
        "!has(self.training.torchCompile) || !self.training.torchCompile || !self.strategy.startsWith('zero3')",
        "spec.training.torchCompile: ZeRO-3 gathers weights inside of blocks, which torch cannot compile; use"
        " strategy ddp, zero1 or zero2, or remove it",
    ),
    Rule(
        "!has(self.training.tf32) || !self.training.tf32 || self.resources.gpusPerNode > 0",
        "spec.training.tf32: needs GPUs; remove it on CPU",
    ),
    *(Rule(f"self.strategy != 'fsdp' || {wanted}", message) for wanted, message in WITH_FSDP),
    *works_with("training.optimizer", SCHEDULES_OF_OPTIMIZERS, "training.schedule", SCHEDULES),
    *(
        Rule(
            f"{unused} || has(self.dataset.evalSplit) || has(self.dataset.evalFiles) ||"
            " has(self.dataset.evalFraction) || (has(self.dataset.mix) && self.dataset.mix.sources.exists(s,"
            " has(s.evalSplit)))",
            f"spec.training.{field}: no rows are held out to evaluate on; set dataset.evalSplit, evalFiles or"
            f" evalFraction, or remove {field}",
        )
        for field, unused in (
            ("evalSteps", "!has(self.training.evalSteps)"),
            ("evalEvery", "self.training.evalEvery == 'steps'"),
        )
    ),
    Rule(
        f"self.resources.gpusPerNode > 0 || !has(self.training.attention) || !(self.training.attention in {ON_GPUS})",
        f"spec.training.attention: {', '.join(ON_GPUS)} need GPUs; use auto, sdpa or eager on CPU",
    ),
    Rule(
        f"!has(self.training.attention) || !(self.training.attention in {OF_PACKED_ROWS}) ||"
        " has(self.training.packing) && self.training.packing == 'isolated'",
        "spec.training.attention: varlen is for rows that share maxLength; set packing: isolated, or use auto",
    ),
    Rule(
        f"!has(self.training.attention) || !(self.training.attention in {IN_16_BITS}) ||"
        " self.training.precision != 'fp32'",
        f"spec.training.attention: {', '.join(IN_16_BITS)} compute in 16 bits; use precision: auto or bf16, or"
        " attention: auto",
    ),
    Rule(
        "self.resources.gpusPerNode > 0 || self.training.precision != 'fp16'",
        "spec.training.precision: fp16 needs a GPU; use fp32 or bf16 on CPU",
    ),
    Rule(
        "!has(self.training.microBatchSize) || self.training.batchSize % (self.training.microBatchSize *"
        f" {PROCESSES}) == 0",
        "spec.training.batchSize: must be a multiple of microBatchSize times the number of processes",
    ),
    Rule(
        f"self.training.batchSize % ({PROCESSES}) == 0",
        "spec.training.batchSize: must be a multiple of the number of processes (nodes times GPUs or processes a node)",
    ),
)
