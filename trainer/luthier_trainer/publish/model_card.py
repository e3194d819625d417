"""The README.md of a published result: what it is, how it was made, its metrics and how to load it.

The front matter follows the format of the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from luthier_api.augmentation import Augmentation
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.methods import METHODS, QUANTIZATIONS
from luthier_api.outputs import LINES
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.tasks import GENERATION_TASKS, TASKS, TRAINING_TASKS, TaskInfo
from luthier_api.trackers import TRACKERS
from luthier_api.workspace import DATA_REPORT, MANIFEST, METRICS_FILE, WorkspaceFolder
from luthier_trainer.generation.result import UNSAFE_ROWS
from luthier_trainer.generation.scores import ROWS, metrics_of
from luthier_trainer.models import quantised_base
from luthier_trainer.models.embedding import tokens_of_adapter
from luthier_trainer.prepare import data_report
from luthier_trainer.publish import dataset_fields
from luthier_trainer.publish.first_outputs import first_outputs, makes_images, shortened
from luthier_trainer.scoring import sums
from luthier_trainer.workspace import tracked_runs
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG, MODEL_CONFIG

SAMPLES, CONSIDERED = 3, 50  # outputs that a card shows, and among how many of the first it looks for them
# Modality → name of the variable for its processor in the example, and the class that loads it
PROCESSORS = {
    "text": ("tokenizer", "AutoTokenizer"),
    "image": ("processor", "AutoImageProcessor"),
    "audio": ("extractor", "AutoFeatureExtractor"),
    "speech": ("processor", "AutoProcessor"),
}
TITLES = {
    "evalLoss": "Held-out loss",
    "evalLossBefore": "Held-out loss before",
    "trainLoss": "Training loss",
    "steps": "Steps",
    "bestStep": "Step with the best evaluation, whose weights these are",
    "tokens": "Tokens",
    "paddingShare": "Share of padding in the computed tokens",
    "seconds": "Seconds",
    "peakMemoryGB": "Peak of memory in GB, of a GPU in tensors, or of a node without GPUs",
    "reservedMemoryGB": "Peak of memory in GB that torch reserved of a GPU",
    "plannedMemoryGB": "Planned peak of memory in GB",
}
LOAD_LORA = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{repo}")"""


def card(run: FineTuneRun | GenerateRun, prepared: PreparedRecord, result: Path) -> str:
    """Return the README of `result`."""
    return model_card(run, prepared, result) if isinstance(run, FineTuneRun) else dataset_card(run, prepared, result)


def model_card(run: FineTuneRun, prepared: PreparedRecord, result: Path) -> str:
    """Return the README of a fine-tuned model or adapter."""
    spec, task, adapter = run.spec, TASKS[run.spec.task], METHODS[run.spec.method.type].adapter
    repo = (spec.hub and spec.hub.repo) or run.name
    metrics = read_metrics(result / METRICS_FILE)
    front: dict[str, Any] = {"library_name": library_of(task, adapter), "pipeline_tag": task.pipeline_tag}
    if spec.model.id:
        front |= {"base_model": spec.model.id, "base_model_relation": "adapter" if adapter else "finetune"}
    mixed = spec.dataset.mix.sources if spec.dataset.mix else [spec.dataset]
    if ids := list(dict.fromkeys(part.id for part in mixed if part.id)):
        front["datasets"] = ids
    front["tags"] = ["luthier", spec.method.type, spec.task, *task.tags]
    training, plan = spec.training, prepared.plan
    facts = {
        "Task": spec.task,
        "Base model": source(prepared.model.source, prepared.model.revision),
        "Dataset": source(prepared.dataset.source, prepared.dataset.revision),
        **{
            f"Source {number} of the mix": f"{source(part.source, part.revision)}, {part.rows} rows of an epoch,"
            f" {part.eval_rows} held out"
            for number, part in enumerate(prepared.dataset.sources or [], 1)
        },
        "Rows": counted(prepared),
        "Method": described_method(spec),
        "Learning rate": f"{training.learning_rate:g}, {training.schedule}",
        "Optimizer": training.optimizer,
        "Batch size": training.batch_size,
        "Epochs": None if training.max_steps else f"{training.epochs:g}",
        "Steps": plan.steps,
        "Tokens a row, at most": training.max_length,
        "Seconds of a clip, at most": training.max_seconds,
        "Pixels of an image": described_pixels(spec),
        "Augmentation": described_augmentation(training.augmentation),
        "Packing": None if training.packing in (None, "none") else training.packing,
        "Strategy": f"{plan.strategy}, {plan.world_size} processes",
        "Seed": training.seed,
        "Classes": ", ".join(prepared.dataset.labels[:50]) if prepared.dataset.labels else None,
    }
    settings = TRAINING_TASKS[spec.task].settings
    if settings:
        facts |= getattr(spec, settings).dump()
    titles = TITLES | {metric.name: metric.title for metric in TRAINING_TASKS[spec.task].metrics}
    load = LOAD_LORA.format(base=spec.model.id or prepared.model.source, repo=repo)
    if task.auto_class is not None:
        load = loading(repo, task, result, head=task.head)
    needs = (
        ""
        if spec.model.id or not adapter
        else f"\nThe adapter's base model lies where the job found it ({prepared.model.source}).\n"
    )
    needs += "".join(f"\nBefore you merge the adapter: {warning}.\n" for warning in shared_weights(run, prepared))
    return document(
        front,
        repo,
        f"Fine-tuned with Luthier, FineTuneJob `{run.name}`.",
        [
            ("Results", table({titles.get(name, name): f"{value:.6g}" for name, value in metrics.items()})),
            ("How it was made", table(facts)),
            ("What was noticed", noticed(prepared)),
            ("Where the training is shown", table(tracked(WorkspaceFolder(Path(run.workspace)).tracking))),
            ("The data", data_table(WorkspaceFolder(Path(run.workspace)).prepared / DATA_REPORT)),
            ("How to load it", f"```python\n{load}\n```\n{needs}"),
        ],
    )


def tracked(folder: Path) -> dict[str, str]:
    """Title of a tracker → page of its run. One that is only in the workspace is left out: readers cannot open it."""
    return {TRACKERS[run.type].title: run.url for run in tracked_runs.read(folder) if run.url}


def data_table(path: Path) -> str:
    """Return the data report as a Markdown table; nothing if `prepare` has written none."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    head, *rows = data_report.table(report)
    lines = [head, ["---"] * len(head), *([cell.replace("|", chr(92) + "|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def described_method(spec: FineTuneJobSpec) -> str:
    """Return the method with its own settings as far as they are set, and the type of quantised frozen weights."""
    fields = [path.removeprefix("method.") for path in METHODS[spec.method.type].fields if path.startswith("method.")]
    values = spec.method.dump()
    settings = ", ".join(f"{name} {plain(values[name])}" for name in fields if is_chosen(values.get(name)))
    quantization = spec.model.quantization
    beside = f" on a base in {QUANTIZATIONS[quantization.type].title}" if quantization else ""
    return f"{spec.method.type}{f' ({settings})' if settings else ''}{beside}"


def described_pixels(spec: FineTuneJobSpec) -> str | None:
    """Return the sizes in which images were learnt; None for tasks that have no such setting."""
    if spec.image is None:
        return None
    square = f"{spec.image.resolution} × {spec.image.resolution}"
    return square if spec.image.bucket_step is None else f"at most as many as {square}, in several shapes"


def described_augmentation(augmentation: Augmentation | None) -> str | None:
    """Return how training images were changed at random; None if they were not."""
    if augmentation is None:
        return None
    return "; ".join(f"{name} {plain(value)}" for name, value in augmentation.dump().items())


def is_chosen(value: Any) -> bool:
    """Whether a setting says something: neither missing, nor switched off, nor an empty pattern."""
    return not (value is None or value is False or value == {})


def plain(value: Any) -> str:
    """Return a setting as text; the items of a list or a mapping are separated by blanks."""
    if isinstance(value, dict):
        value = [f"{name}={item}" for name, item in value.items()]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def library_of(task: TaskInfo, adapter: bool) -> str:
    """Return the name that the Hub uses for the library that loads the result."""
    if task.auto_class is None:
        return "diffusers"
    return "peft" if adapter else "transformers"


def shared_weights(run: FineTuneRun, prepared: PreparedRecord) -> list[str]:
    """Return a sentence for each module with an adapter that shares its weights with another module.

    The list is empty if the base model is not available in this pod.
    """
    method, folder = run.spec.method, Path(prepared.model_path)
    if (
        not METHODS[method.type].adapter
        or "all-linear" in (method.target_modules or ["all-linear"])
        or not (folder / MODEL_CONFIG).is_file()
    ):
        return []  # all-linear selects no embeddings
    from luthier_trainer.methods import checks as method_checks
    from luthier_trainer.models import inspect  # imports torch, which few jobs need here

    model = inspect.skeleton(inspect.read_config(folder, "spec.model"), run.spec.task, "spec.model")
    shared = inspect.tied_modules(model)
    return [
        method_checks.SHARED.format(name=name, other=other)
        for name, other in shared.items()
        if any(f".{name}".endswith(f".{target}") for target in method.target_modules)
    ]


def loading(repo: str, task: TaskInfo, result: Path, head: bool) -> str:
    """Return the lines of Python that load `result` from the repository `repo`."""
    variable, processor_class = PROCESSORS[task.modality]
    processor = f'{variable} = {processor_class}.from_pretrained("{repo}")'
    auto = task.auto_class
    if not (result / ADAPTER_CONFIG).is_file():
        return (
            f"from transformers import {auto}, {processor_class}\n\nmodel ="
            f' {auto}.from_pretrained("{repo}")\n{processor}'
        )
    adapter = json.loads((result / ADAPTER_CONFIG).read_text())
    quantised = Quantised.of(adapter)
    if not head and task.auto_model and task.peft_task_type:
        peft = f"AutoPeftModelFor{task.auto_model}"
        return (
            f"from peft import {peft}\nfrom transformers import {quantised.imported}{processor_class}\n\n"
            f'{quantised.line}model = {peft}.from_pretrained("{repo}"{quantised.given})\n{processor}'
        )
    if not head:  # PEFT has no class for such models
        base = f'"{adapter["base_model_name_or_path"]}"'
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}, {quantised.imported}{processor_class}\n\n"
            f"{quantised.line}base = {auto}.from_pretrained({base}{quantised.given})\n"
            f'model = PeftModel.from_pretrained(base, "{repo}")\n{processor}'
        )
    # PEFT's Auto classes would load the base with its own labels. Its head, if it has one, is for other labels, and the
    # adapter holds the head that was trained.
    base = f'"{adapter["base_model_name_or_path"]}"' + (
        f', revision="{adapter["revision"]}"' if adapter.get("revision") else ""
    )
    rows = ""
    if held := tokens_of_adapter(result):
        rows = (
            f"base.resize_token_embeddings(max({max(held) + 1}, base.get_input_embeddings().num_embeddings))  # for the"
            " new tokens\n"
        )
    return (
        f"from peft import PeftModel\nfrom transformers import AutoConfig, {auto}, {quantised.imported}"
        f"{processor_class}\n\n"
        f"{quantised.line}"
        f'config = AutoConfig.from_pretrained("{repo}")  # with the classes and the padding token\n'
        f"base = {auto}.from_pretrained({base}, config=config, ignore_mismatched_sizes=True{quantised.given})\n{rows}"
        f'model = PeftModel.from_pretrained(base, "{repo}")\n{processor}'
    )


@dataclass(frozen=True)
class Quantised:
    """What is added to the lines that load an adapter which belongs to a base in 4 bits; nothing for others."""

    imported: str = ""
    line: str = ""
    given: str = ""

    @classmethod
    def of(cls, adapter: Mapping[str, Any]) -> Quantised:
        """`adapter`: the configuration of the adapter."""
        arguments = quantised_base.arguments_of(adapter)
        if not arguments:
            return cls()
        written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        dtype = adapter[quantised_base.SETTINGS][quantised_base.DTYPE]
        return cls(
            imported="BitsAndBytesConfig, ",
            line=f"# The adapter fits the base in these 4 bits alone.\nbits = BitsAndBytesConfig({written})\n",
            given=f', dtype="{dtype}", quantization_config=bits',
        )


COUNTS = ("rows", "failedRows", UNSAFE_ROWS)
"""Metrics of shards of which a card tells the sum."""


def dataset_card(run: GenerateRun, prepared: PreparedRecord, result: Path) -> str:
    """Return the README of a dataset of generated outputs."""
    spec = run.spec
    repo = (spec.hub and spec.hub.repo) or run.name
    manifests = [json.loads(path.read_text()) for path in sorted(result.glob(f"shard-*.{MANIFEST}"))]
    metrics = {name: sum(manifest["metrics"].get(name, 0) for manifest in manifests) for name in COUNTS}
    total = reduce(sums.added, (sums.read(manifest.get("sums", {})) for manifest in manifests), sums.read({}))
    titles = {metric.name: metric.title for metric in GENERATION_TASKS[spec.task].metrics}
    scores = {titles[name]: f"{value:.6g}" for name, value in metrics_of(spec.task, total).items()}
    front: dict[str, Any] = {
        "tags": ["luthier", spec.task, "synthetic"],
        "configs": [dataset_fields.config(manifests, spec.outputs.format)],
    }
    if info := dataset_fields.info(manifests, spec.outputs.format):
        front["dataset_info"] = info
    facts = {
        "Task": spec.task,
        "Model": source(prepared.model.source, prepared.model.revision),
        "Adapters": ", ".join(source(a.source, a.revision) for a in prepared.adapters) or None,
        "Inputs": f"{source(prepared.dataset.source, prepared.dataset.revision)}, {prepared.dataset.rows} rows",
        "Outputs": f"{metrics['rows']:g}",
        "Of them failed": f"{metrics['failedRows']:g}" if metrics["failedRows"] else None,
        "Of them unsafe": f"{metrics[UNSAFE_ROWS]:g}" if spec.image and spec.image.safety else None,
        "Seed": spec.seed,
        **spec.settings.dump(),
    }
    about = (
        f"Generated with Luthier, GenerateJob `{run.name}`. Each row is an output: its inputs, seed and digest, the"
        " settings that its row overrides (`settings`), what else stood in its row of the inputs (`input`), or why it"
        " could not be made (`error`). `run` names an entry of `runs` in the manifests: all settings, the versions of"
        " model and adapters, and the libraries and the hardware."
    )
    load = f'```python\nfrom datasets import load_dataset\n\noutputs = load_dataset("{repo}", split="train")\n```'
    compared = f"Over the {total[ROWS]} outputs that have a reference and could be made.\n\n" if scores else ""
    sections = [
        ("How to load it", load),
        ("Samples", samples(run, result)),
        ("Metrics", compared + table(scores)),
        ("How it was made", table(facts)),
        ("What was noticed", noticed(prepared)),
    ]
    return document(front, repo, about, sections)


def noticed(prepared: PreparedRecord) -> str:
    """Return as a list what `prepare` said that it changed, left out or drew at random."""
    return "\n".join(f"- {without_marks(text)}" for text in prepared.notices)


def samples(run: GenerateRun, result: Path) -> str:
    """Return some of the first outputs that could be made: images where they are files of the dataset, or lines."""
    try:
        found = first_outputs(run, result, CONSIDERED)
    except FileNotFoundError:  # the lines of outputs in another form have been deleted
        return ""
    made = [(line, file) for line, file in found if line.get("error") is None][:SAMPLES]
    if makes_images(run):
        if run.spec.outputs.format != LINES:
            return ""
        return "\n\n".join(f"![{unmarked(line['prompt'])}]({file.relative_to(result)})" for line, file in made if file)
    told = [{name: value for name, value in line.items() if value is not None} for line, _ in made]
    shown = [shortened(json.dumps(line, ensure_ascii=False)) for line in told]
    return "\n".join(["```text", *shown, "```"]) if shown else ""


def unmarked(text: str) -> str:
    """Return the beginning of a text as one line, in which no character is a mark of Markdown or HTML."""
    return without_marks(shortened(text))


def without_marks(text: str) -> str:
    """Return a text as one line, in which no character is a mark of Markdown or HTML."""
    return re.sub(r"""([!"#$%&()*+/<=>?@\[\\\]^_`{|}~])""", r"\\\1", " ".join(text.split()))


def document(front: Mapping[str, Any], title: str, about: str, sections: list[tuple[str, str]]) -> str:
    """Return a README in Markdown with front matter. Empty sections are left out."""
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    body = "\n\n".join(f"## {name}\n\n{text.rstrip()}" for name, text in sections if text.strip())
    return f"---\n{head}---\n\n# {title}\n\n{about}\n\n{body}\n"


def table(facts: Mapping[str, object]) -> str:
    """Return a Markdown table of names and values, without those that are None."""
    rows = [
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items() if value is not None
    ]
    return "\n".join(["| | |", "|---|---|", *rows]) if rows else ""


def source(name: str, revision: str | None) -> str:
    """Return the name of a source with its revision, if it has one."""
    return f"{name} @ {revision}" if revision else name


def counted(prepared: PreparedRecord) -> str:
    """Return the numbers of training and held-out rows as text."""
    held_out = f", {prepared.dataset.eval_rows} held out" if prepared.dataset.eval_rows else ""
    return f"{prepared.dataset.rows}{held_out}"


def read_metrics(path: Path, key: str | None = None) -> dict[str, float]:
    """Return the metrics in a JSON file, or under its entry `key`; an empty dict if the file cannot be read."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return dict(data.get(key, {}) if key else data)
