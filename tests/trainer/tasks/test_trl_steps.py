"""What is planned of steps of TRL's trainers, of what the model writes, and of images, against real ones on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.trainer import utils

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import StepMemory
from luthier_api.status import ResolvedSource
from luthier_api.tasks import TASKS
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.methods.apply import with_method
from luthier_trainer.models import memory
from luthier_trainer.models.memory import Setting, Trial
from luthier_trainer.prepare.memory import memory_facts
from luthier_trainer.tasks.base import Model, TrainingContext
from luthier_trainer.tasks.table import task_of
from luthier_trainer.training.arguments import training_arguments
from luthier_trainer.workspace import gpu_memory
from luthier_trainer.workspace.plan import plan_training
from trainer import measured_memory

ROWS, PROMPT, ANSWER, MORE = 6, 12, 28, 5
MANY = 48  # rows that are written at once: attention on a CPU has buffers of 20 KB, however few there are
UNDER, OVER = 0.02, 0.06
CHUNK = 64  # words of TRL's head that are computed at once; its own 32,768 would hide all else of a small model
FULL: dict[str, Any] = {"type": "full"}
LORA: dict[str, Any] = {"type": "lora", "rank": 4}


@dataclass(frozen=True)
class Case:
    task: str
    method: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    recomputed: bool = False

    @property
    def name(self) -> str:
        return f"{self.task} {self.method['type']} {self.fields} {'recomputed' * self.recomputed}"


CASES = [
    Case("preference", FULL),
    Case("preference", FULL, {"preference": {"precomputeReference": True}}),
    Case("preference", LORA, recomputed=True),
    Case("preference", LORA, {"preference": {"lossType": "kto"}}),
    Case("reward", FULL),
    Case("grpo", FULL),
    Case("grpo", LORA, {"grpo": {"beta": 0.04}}, recomputed=True),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", CHUNK)


def spec_of(case: Case) -> FineTuneJobSpec:
    fields = dict(case.fields)
    if case.task == "grpo":
        rewards = [{"type": "regex", "pattern": "a"}]
        own = {"maxCompletionLength": ANSWER, "generations": 2, "rewards": rewards}
        fields["grpo"] = own | fields.get("grpo", {})
    training = {"batchSize": ROWS, "microBatchSize": ROWS, "maxLength": PROMPT + ANSWER + MORE, "maxSteps": 1}
    given = {"task": case.task, "model": {"id": "a/b"}, "dataset": {"id": "a/c"}, "method": case.method}
    return FineTuneJobSpec.model_validate(
        given
        | {"training": training | {"gradientCheckpointing": case.recomputed}, "resources": {"gpusPerNode": 0}}
        | fields
    )


def rows_of(case: Case) -> Dataset:
    """Return rows in the form of `prepare`, each as long as the longest."""
    prompts, answers = [list(range(3, 3 + PROMPT))] * ROWS, [list(range(40, 40 + ANSWER))] * ROWS
    lengths = [PROMPT + ANSWER] * ROWS
    if case.task == "reward":
        whole = [a + b for a, b in zip(prompts, answers, strict=True)]
        return Dataset.from_dict({"chosen_ids": whole, "rejected_ids": whole, "length": lengths})
    if case.task == "grpo":
        return Dataset.from_dict({"prompt_ids": prompts, "length": [PROMPT] * ROWS})
    if "preference" in case.fields and case.fields["preference"].get("lossType") == "kto":
        labels = [True, False] * (ROWS // 2)
        columns = {"prompt_ids": prompts, "completion_ids": answers, "label": labels, "length": lengths}
        return Dataset.from_dict(columns)
    columns = {"prompt_ids": prompts, "chosen_ids": answers, "rejected_ids": answers, "length": lengths}
    return Dataset.from_dict(columns)


def trial_of(case: Case, spec: FineTuneJobSpec, folder: Path) -> tuple[Any, Trial]:
    """Return the model with its method and the step, on the meta device."""
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trial = task_of(spec).trial(
        Model(ResolvedSource(source="a/b"), folder, config, tokenizer), spec, None, rows_of(case)
    )
    assert not isinstance(trial, str)
    with torch.device("meta"):
        adapted = with_method(trial.model, spec.method, TASKS[spec.task].peft_task_type, trial.heads, deepspeed=False)
    return adapted, trial


def real(case: Case, spec: FineTuneJobSpec, folder: Path, checkpoints: Path) -> tuple[int, int]:
    """Return the bytes that autograd keeps, beside weights, and the allocator's peak in a step of TRL's trainer."""
    task, rows = task_of(spec), rows_of(case)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = TrainingContext(spec, folder, tokenizer, weights={"dtype": torch.float32})
    loaded = task.load_model(context)
    model = with_method(loaded.model, spec.method, TASKS[spec.task].peft_task_type, loaded.new_modules, deepspeed=False)
    arguments = training_arguments(task, spec, plan_training(spec, ROWS, None), checkpoints, False, step_timeout=600)
    setup = task.trainer(context, loaded.model)
    trainer: Any = setup.trainer(
        model=model,
        args=arguments,
        data_collator=setup.collator,
        train_dataset=rows,
        eval_dataset=None,
        processing_class=tokenizer,
        **setup.options,
    )
    trainer.ranks = Ranks()
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    if case.recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss() -> torch.Tensor:
        given = completions(spec) if case.task == "grpo" else trainer.data_collator([rows[i] for i in range(ROWS)])
        if "precomputeReference" in case.fields.get("preference", {}):
            given |= {"ref_chosen_logps": torch.zeros(ROWS), "ref_rejected_logps": torch.zeros(ROWS)}
        found: torch.Tensor = trainer.compute_loss(model, given)
        return found

    return measured_memory.of_step(loss, model)


def completions(spec: FineTuneJobSpec) -> dict[str, Any]:
    """Return a batch of GRPO, whose completions are written already."""
    prompts, answers = (torch.randint(3, 100, (ROWS, width)) for width in (PROMPT, ANSWER))
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "advantages": torch.ones(ROWS),
        "num_items_in_batch": torch.tensor(ROWS * ANSWER),
        "ref_per_token_logps": torch.zeros(ROWS, ANSWER),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_of_trl_holds_what_is_predicted(case: Case, llama: Path, tmp_path: Path) -> None:
    spec = spec_of(case)
    adapted, trial = trial_of(case, spec, llama)
    step = memory.step_of(adapted, trial, Setting("cpu", None, case.recomputed, padded=True))
    kept, peak = real(case, spec, llama, tmp_path)
    assert -UNDER <= (step.kept_fixed + ROWS * step.kept_per_row) / kept - 1 <= OVER
    assert -UNDER <= highest(step) / peak - 1 <= OVER


def highest(step: StepMemory) -> int:
    return max(moment.fixed + ROWS * moment.per_row + moment.gradients for moment in step.moments)


def test_what_the_model_writes_is_predicted(llama: Path) -> None:
    case = Case("grpo", FULL, {"grpo": {"topP": 0.9, "temperature": 0.7}})
    spec = spec_of(case)
    adapted, trial = trial_of(case, spec, llama)
    assert trial.writes is not None
    writes = trial.writes
    lines = memory.lines_of(lambda rows: memory.generated(adapted, writes, rows, Setting("cpu", None, padded=True)))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.randint(3, 100, (MANY, PROMPT))
    model.generation_config.eos_token_id = None  # each row is as long as the longest
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "do_sample": True}
    options |= {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
    peak = measured_memory.peak_of(
        lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    )
    assert -UNDER <= gpu_memory.line(lines, MANY) / peak - 1 <= OVER


@dataclass(frozen=True)
class Written:
    name: str
    micro: int
    accumulation: int
    generations: int
    completions: int
    evaluated: int


WRITTEN = [
    Written("all completions of a step", micro=2, accumulation=4, generations=2, completions=8, evaluated=2),
    Written("whole groups in an evaluation", micro=2, accumulation=2, generations=8, completions=8, evaluated=8),
    Written("some groups", micro=12, accumulation=1, generations=4, completions=12, evaluated=12),
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_the_completions_that_are_written_at_once(case: Written) -> None:
    spec = spec_of(Case("grpo", FULL, {"grpo": {"generations": case.generations}}))
    plan = plan_training(spec, 8, None).model_copy(
        update={"micro_batch_size": case.micro, "accumulation_steps": case.accumulation}
    )
    assert gpu_memory.written_rows(spec, plan) == case.completions
    assert gpu_memory.evaluated_rows(spec, plan) == case.evaluated


@pytest.mark.parametrize("memory", ["8Gi", None])
def test_on_a_cpu_a_step_is_computed_where_there_is_a_limit(memory: str | None, llama: Path) -> None:
    given = spec_of(Case("reward", FULL))
    spec = given.model_copy(update={"resources": given.resources.model_copy(update={"memory": memory})})
    model = Model(
        ResolvedSource(source="a/b"), llama, AutoConfig.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    )
    plan = plan_training(spec, ROWS, None)
    task = task_of(spec)
    facts = memory_facts(
        task, model, spec, plan, task.weights(model, spec, plan, None), None, rows_of(Case("reward", FULL))
    )
    planned = gpu_memory.peak(spec, plan, facts)
    if memory is None:
        assert (facts.steps, planned.partial) == ([], True)
        return
    assert [step.checkpointing for step in facts.steps] == [False]
    states = sum(gpu_memory.always(spec, plan, facts).values())
    assert planned.partial is None
    assert planned.host_bytes > gpu_memory.PROCESS_BYTES["cpu"] + states + facts.gradient_bytes
