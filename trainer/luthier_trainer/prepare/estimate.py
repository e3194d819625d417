"""Plans a FineTuneJob from its manifest and the configuration of a model: `python -m luthier_trainer.prepare.estimate`.

Nothing is downloaded, no rows are read and no weights: rows count as `training.maxLength` tokens. The request and the
answer are JSON documents; the answer is on stdout, and everything else on stderr.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import METHODS
from luthier_api.run import FineTuneRun, Gpu, read_run
from luthier_api.spec import TokenizerTraining
from luthier_api.status import Plan, ResolvedSource
from luthier_api.tasks import TASKS
from luthier_trainer.models.inspect import MODEL, read_config
from luthier_trainer.prepare.memory import memory_facts
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.base import Model, Task
from luthier_trainer.tasks.table import task_of
from luthier_trainer.workspace import fitting, layout, speed
from luthier_trainer.workspace.layout import Facts
from luthier_trainer.workspace.model_files import MODEL_CONFIG
from luthier_trainer.workspace.plan import plan_space, plan_training

UNKNOWN_ROWS = 1  # where neither the rows nor maxSteps are known; the figures of a whole training are then left out
USUAL_IMAGE = 224  # pixels of a side, where a configuration does not say it


@dataclass(frozen=True)
class Request:
    """What to plan."""

    run: FineTuneRun
    config: Path | None
    """A folder with the model's config.json, or the file; None: that of the model in the spec."""
    rows: int | None
    """Rows to learn from, if they are known."""
    classes: dict[str, Gpu]
    """Classes of GPUs to compare; empty: that of the job alone."""


def answer(request: Request, scratch: Path) -> dict[str, Any]:
    """Return the plan, or for each class its plan or why there is none. `scratch`: an empty folder.

    Raises Failure if no model can be planned.
    """
    run, task = request.run, task_of(request.run.spec)
    model = described(request, task, scratch)
    assumed = list(assumptions(request))
    facts, plan = facts_for(task, model, run.spec, request.rows)
    found: dict[str, Any] = {"assumptions": assumed, "notices": notices.given()}
    if not request.classes:
        return {"plan": planned(run, task, model, plan, facts, request).dump(), **found}
    compared = []
    for name, gpu in request.classes.items():
        resources = run.spec.resources.model_copy(update={"gpu_class": name, "gpu_memory": None})
        spec = run.spec.model_copy(update={"resources": resources})
        of_class = run.model_copy(update={"spec": spec, "gpu": gpu, "gpu_classes": {}})
        entry: dict[str, Any] = {"gpuClass": name, **gpu.dump()}
        try:
            entry |= {"fits": True, "plan": planned(of_class, task, model, plan, facts, request).dump()}
        except Failure as failure:
            if failure.code != ExitCode.DOES_NOT_FIT:
                raise
            entry |= {"fits": False, "message": failure.message}
        compared.append(entry)
    return {"classes": compared, **found}


def planned(run: FineTuneRun, task: Task, model: Model, plan: Plan, facts: Facts, request: Request) -> Plan:
    """Return the plan of `run`. Raises Failure(DOES_NOT_FIT) if there is none."""

    def other(spec: FineTuneJobSpec) -> Facts:
        return facts_for(task, model, spec, request.rows)[0]

    chosen = plan_space(fitting.fitted(run, plan, facts, other=other), facts.weights, processor_bytes=0)
    chosen = layout.estimated(run, chosen, facts)
    if request.rows is None and run.spec.training.max_steps is None:
        unknown = dict.fromkeys(("steps", "tokens", "flops", "seconds", "gpu_hours"))
        chosen = chosen.model_copy(update=unknown)
    return chosen


def facts_for(task: Task, model: Model, spec: FineTuneJobSpec, rows: int | None) -> tuple[Facts, Plan]:
    """Return what a layout is chosen from, and the safe layout."""
    trouble = task.cannot_recompute(model, spec) if spec.resources.gpus_per_node else None
    learnt = task.epoch_rows(spec, rows or UNKNOWN_ROWS)
    plan = plan_training(spec, learnt, None, trouble, task.whole_logits(model), task.attention(model, spec))
    labels = None if not TASKS[spec.task].head else [str(i) for i in range(getattr(model.config, "num_labels", 2))]
    weights = task.weights(model, spec, plan, labels)
    plan = plan.model_copy(update={"parameters": weights.total})
    memory = memory_facts(task, model, spec, plan, weights, labels, None)
    compute = task.compute(model, spec, labels, None)
    return Facts(memory, weights, compute, trouble), plan


def described(request: Request, task: Task, scratch: Path) -> Model:
    """Return the model by its configuration. `scratch`: an empty folder. Raises Failure if none is there."""
    spec = request.run.spec
    if spec.model.config is not None and request.config is None:
        from luthier_trainer.models.new_model import new_config

        config = new_config(spec.model.config, task=spec.task)
        config.vocab_size = spec.model.vocabulary
        config.save_pretrained(scratch)
        return Model(ResolvedSource(source="new"), scratch, config, SimpleNamespace(pad_token_id=0))
    folder = folder_of(request, scratch)
    source = ResolvedSource(source=str(folder))
    if TASKS[spec.task].auto_class is None:
        return Model(source, folder, None, None)
    config = read_config(folder, MODEL)
    return with_new_tokens(Model(source, folder, config, processor_of(task, folder, config, spec.task)), spec)


def with_new_tokens(model: Model, spec: FineTuneJobSpec) -> Model:
    """Return the model with rows of the embedding for the tokens that the job adds, as many as it asks for."""
    asked = spec.model.tokenizer.train if spec.model.tokenizer else TokenizerTraining()
    control = {*(spec.model.add_special_tokens or []), *(asked.special_tokens or [])}
    if not control and asked.vocab_size is None:
        return model
    text = model.config.get_text_config()
    known = model.processor.get_vocab() if hasattr(model.processor, "get_vocab") else {}
    entries = len(known) or text.vocab_size
    end = max(entries + len(control - known.keys()), asked.vocab_size or 0)
    if METHODS[spec.method.type].adapter:
        return replace(model, new_tokens=range(entries, end))
    text.vocab_size = max(text.vocab_size, end)
    return model


def processor_of(task: Task, folder: Path, config: Any, name: str) -> Any:
    """Return the processor of the model, or what stands for one that is not there. `name`: of the task."""
    with contextlib.suppress(Failure):
        return task.read_processor(folder, MODEL)
    if TASKS[name].modality == "image":
        return images_of(config)
    if TASKS[name].modality in ("audio", "speech"):
        return audio_of(config)
    return SimpleNamespace(pad_token_id=0)


def images_of(config: Any) -> Callable[..., dict[str, Any]]:
    """Return what makes images of the size that the configuration names, as an image processor would."""
    import torch

    size = getattr(config, "image_size", None) or USUAL_IMAGE
    sides = (size, size) if isinstance(size, int) else tuple(size)
    notices.notice(
        f"spec.model: its image processor is not there, so images of {sides[0]} x {sides[1]} pixels are assumed"
    )

    def process(images: Sequence[Any], **_: Any) -> dict[str, Any]:
        return {"pixel_values": torch.zeros(len(images), getattr(config, "num_channels", 3), *sides)}

    return process


def audio_of(config: Any) -> Any:
    """Return the feature extractor that models of this architecture usually have.

    Raises Failure if transformers knows none.
    """
    from transformers import FEATURE_EXTRACTOR_MAPPING

    kind = FEATURE_EXTRACTOR_MAPPING.get(type(config), None)
    if kind is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{MODEL}: without its preprocessor_config.json, what {config.model_type} hears is not known",
        )
    bins = {"feature_size": config.num_mel_bins} if config.model_type == "whisper" else {}
    made = kind(**bins)
    notices.notice(
        f"spec.model: its feature extractor is not there, so that of most such models is assumed ({kind.__name__},"
        f" {made.sampling_rate:,} Hz)"
    )
    return made


def folder_of(request: Request, scratch: Path) -> Path:
    """Return the folder with the configuration: as asked for, of the spec, of another job, or of the Hub's cache.

    A file may have any name, and is copied into `scratch`. Raises Failure if there is none.
    """
    spec = request.run.spec.model
    if request.config is not None:
        folder = request.config if request.config.is_dir() else scratch
        file = request.config / MODEL_CONFIG if request.config.is_dir() else request.config
        if not file.is_file():
            raise Failure(ExitCode.NOT_FOUND, f"--model-config {request.config}: there is no such file")
        if folder is scratch:
            shutil.copyfile(file, scratch / MODEL_CONFIG)
    elif spec.path is not None:
        folder = Path(spec.path)
    elif spec.job is not None:
        folder = Path(request.run.sources[spec.job]) / "result"
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(spec.id or "", MODEL_CONFIG, revision=spec.revision or "main")
        if not isinstance(cached, str):
            raise Failure(
                ExitCode.NOT_FOUND,
                f"spec.model.id: the configuration of {spec.id} is not on this machine, and nothing is downloaded here."
                " Name a file: --model-config config.json, or plan without --quick",
            )
        folder = Path(cached).parent
    return folder


def assumptions(request: Request) -> list[str]:
    """Return what was taken for granted, a sentence each."""
    spec, found = request.run.spec, []
    if spec.training.max_length:
        found.append(f"each row has training.maxLength tokens ({spec.training.max_length:,})")
    if TASKS[spec.task].modality in ("audio", "speech"):
        found.append("each row has as much audio as the model hears (training.maxSeconds)")
    if spec.model.config is None and spec.model.tokenizer and spec.model.tokenizer.train.vocab_size:
        found.append("the rows have as many pieces as model.tokenizer.train.vocabSize asks for")
    if request.rows is None and spec.training.max_steps is None:
        found.append(
            "the number of rows is not known: name it with --rows, or set training.maxSteps, for steps and time"
        )
    found.append(
        f"a GPU multiplies with {speed.MULTIPLYING:.0%} of its peak, and moves data with {speed.MOVING:.0%} of the"
        " speed of its memory"
    )
    return found


def main(request_file: str) -> int:
    """Print the answer; return the exit code."""
    logging.disable(logging.WARNING)
    document = json.loads(Path(request_file).read_text())
    with contextlib.redirect_stdout(sys.stderr):
        run = read_run(json.dumps(document["run"]))
        assert isinstance(run, FineTuneRun), "the command has checked the kind"
        classes = {name: Gpu.model_validate(gpu) for name, gpu in document["classes"].items()}
        config = Path(document["config"]) if document.get("config") else None
        try:
            with TemporaryDirectory(prefix="luthier-") as scratch:
                found = answer(Request(run, config, document.get("rows"), classes), Path(scratch))
        except Failure as failure:
            print(failure.message, file=sys.stderr)
            return int(failure.code)
    print(json.dumps(found, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
