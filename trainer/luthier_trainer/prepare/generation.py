"""`prepare` of a GenerateJob: fetches and checks model and adapters, and writes the rows (`generation_rows`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.methods import QUANTIZATIONS
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.spec import ModelSource
from luthier_api.status import Plan
from luthier_api.task_settings import ImageSettings
from luthier_api.tasks import TASKS, TOOLS, GenerateTask, Modality
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import chats
from luthier_trainer.data.masks import ChatReader, Unreadable
from luthier_trainer.generation import rows as prepared_rows
from luthier_trainer.generation.engines.table import engine_class
from luthier_trainer.generation.rows import Line
from luthier_trainer.methods.checks import check_quantisable
from luthier_trainer.models import adapters, checks, embedding, inspect, processors, sources, weight_check, weight_files
from luthier_trainer.models.materialize import whole_model
from luthier_trainer.prepare import answer_plan, generation_files, image_plan, references
from luthier_trainer.prepare.bad_rows import BadRow
from luthier_trainer.prepare.generation_cells import is_chat
from luthier_trainer.prepare.generation_rows import read_inputs, write_rows
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace import space
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG
from luthier_trainer.workspace.plan import plan_generation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SYSTEM_ROLES = ("system", "developer")  # roles of a message that says how to answer
MODEL, CHAT, REFINER, SAFETY = "spec.model", "spec.text.chat", "spec.image.refiner", image_plan.SAFETY
TOKENIZER = "tokenizer_config.json"  # where transformers saves the class of a tokenizer
ROWS = "rows.jsonl"  # the prepared rows
CHAT_TEMPLATE = "chat_template.jinja"  # where transformers saves the template of a tokenizer
OTHER_TOKENIZER = (
    "Take the tokenizer that belongs to the model, or give these rows in a FineTuneJob with model.resizeEmbeddings:"
    " true"
)


def prepare(run: GenerateRun, folder: WorkspaceFolder, cache: Path) -> PreparedRecord:
    """Prepare everything in `folder` except the record, which is returned.

    `cache`: folder for downloaded data. Raises Failure if the job cannot run.
    """
    import datasets

    datasets.disable_progress_bars()
    spec = run.spec
    located = sources.locate(spec.model, run, MODEL)
    found = [sources.locate(a, run, f"spec.adapters[{i}]") for i, a in enumerate(spec.adapters)]
    rows, inputs, read = read_inputs(run, cache)
    library = TASKS[spec.task].library
    path = whole_model(located, run, folder, run.spec.model.job, "model")
    path = CHECKED_MODELS[library](path, spec, located, rows, folder)
    paths = [fetch_adapter(a, folder.prepared / "adapters" / str(i), run, i) for i, a in enumerate(found)]
    for i, adapter in enumerate(paths):
        adapters.check(
            adapter.parent if found[i].file else adapter, spec.adapters[i].job, found[i].field, run, located, path
        )
    fields = [adapter.field for adapter in found]
    beside = {field: (source, source.fetch(folder.prepared / name)) for field, name, source in locate_beside(run)}
    beside_paths = {field: fetched for field, (_, fetched) in beside.items()}
    parameters = CHECKED_TOGETHER[library](path, spec, list(zip(paths, fields, strict=True)), rows, located.field)
    if REFINER in beside:
        parameters = (parameters or 0) + check_refiner(beside_paths[REFINER], path, spec)
    if SAFETY in beside:
        parameters = (parameters or 0) + check_safety(beside_paths[SAFETY], spec, folder)

    if reads_texts(spec):
        check_tokens(path, spec, located.field, list(zip(paths, fields, strict=True)), rows, folder)
    render = chat_writer(paths, folder, spec.text.system_prompt) if is_chat(run) else unchanged
    if spec.image:
        render = size_writer(path, spec.image, located.field)
    others = (located, *found, *(source for source, _ in beside.values()))
    target = folder.prepared / ROWS
    written = write_rows(run, rows, target, render)
    report_idle_shards(spec, written.outputs)
    generation_files.report_distorted(run, prepared_rows.read(target))
    size = target.stat().st_size
    needed = space.outputs_bytes(spec, written.outputs, size * written.outputs // max(written.rows, 1))
    space.check_outputs(needed, written.outputs, folder.root)
    plan = plan_generation(spec, written.outputs, size, needed.most, parameters)
    return PreparedRecord(
        model=located.resolved,
        dataset=inputs.model_copy(update={"rows": written.rows, "outputs": written.outputs}),
        adapters=[a.resolved for a in found],
        plan=PLANNED[library](run, plan, path, beside_paths, prepared_rows.read(target)),
        model_path=str(path),
        adapter_paths=[str(p) for p in paths],
        other_model_paths=[str(fetched) for fetched in beside_paths.values()],
        refiner=beside[REFINER][0].resolved if REFINER in beside else None,
        safety=beside[SAFETY][0].resolved if SAFETY in beside else None,
        origins=[*(origin for source in others for origin in source.origins), *read],
        dataset_path=str(target),
        rows_sha256=written.sha256,
    )


def locate_beside(run: GenerateRun) -> Iterator[tuple[str, str, sources.Located]]:
    """Yield field and folder of each model that images need beside their own, and where it is; first the refiner."""
    for field, name in ((REFINER, "refiner"), (SAFETY, "safety")):
        given = getattr(run.spec.image, name) if run.spec.image else None
        if given is not None:
            source = ModelSource(id=given.id, revision=given.revision, path=given.path)
            yield field, name, sources.locate(source, run, field)


def check_safety(path: Path, spec: GenerateJobSpec, folder: WorkspaceFolder) -> int:
    """Return the number of weights of the model that checks images. Raises Failure if it cannot."""
    from luthier_trainer.generation import safety  # imports torch

    return safety.check(path, spec.image, folder)


def check_refiner(refiner: Path, base: Path, spec: GenerateJobSpec) -> int:
    """Return the number of weights of the refiner. Raises Failure if it does not suit the pipeline in `base`."""
    from luthier_trainer.generation import pipelines  # imports torch and diffusers

    return pipelines.check_refiner(refiner, base, spec.image)


def reads_texts(spec: GenerateJobSpec) -> bool:
    """Return whether a model of transformers reads texts of the rows."""
    task = TASKS[spec.task]
    return task.library == "transformers" and task.modality == "text"


def unchanged(line: Line) -> Line:
    """Return a row whose prompt is what the model reads."""
    return line


def size_writer(path: Path, image: ImageSettings, field: str) -> Callable[[Line], Line]:
    """Return a function that gives a row the size of its aspect ratio, for the pipeline in `path`.

    A notice names each size. The function raises BadRow if the model has no such sizes. Raises Failure if that is so,
    and the job has an aspect ratio.
    """
    from luthier_trainer.generation import sizes  # imports torch and diffusers

    @cache
    def size(ratio: str) -> tuple[int, int]:
        width, height = sizes.size_of(ratio, sizes.trained_side(path, field))
        notice(f"spec.image.aspectRatio: {ratio} is drawn with {width} × {height}")
        return width, height

    if image.aspect_ratio:
        size(image.aspect_ratio)

    def write(line: Line) -> Line:
        """Return the row with its size. Raises BadRow if the model has none for its aspect ratio."""
        own = line.get("settings", {})
        ratio = own.get("aspectRatio", image.aspect_ratio)
        if not ratio:
            return line
        try:
            width, height = size(ratio)
        except Failure as failure:
            raise BadRow(failure.message.removeprefix("spec.")) from None
        return line | {"settings": own | {"width": width, "height": height}}

    return write


def report_idle_shards(spec: GenerateJobSpec, outputs: int) -> None:
    """Give a notice if shards have nothing to do, or compute more padding than outputs."""
    share, size = outputs / spec.shards, min(spec.batch_size, outputs)
    if share < 1:
        notice(
            f"spec.shards: {spec.shards - outputs} of {spec.shards} have nothing to do, because the job has"
            f" {outputs} outputs; {outputs} shards or fewer are enough"
        )
    elif share < size:
        notice(
            f"spec.shards: {spec.shards} shards share {outputs} outputs, so their batches of {size} (batchSize) are"
            f" filled up by computing outputs again. With shards: {-(-outputs // size)} each is computed once, as fast"
        )


def chat_writer(
    adapter_paths: list[Path], folder: WorkspaceFolder, system_prompt: str | None
) -> Callable[[Line], Line]:
    """Return a function that writes the messages of a row as its prompt, with the chat template that the engine's
    tokenizer then has. It raises BadRow if the template cannot write them.

    The template of the last adapter that has one comes before that of the model. Raises Failure if there is none.
    """
    path = folder.prepared / "tokenizer"
    tokenizer = processors.read_tokenizer(path, MODEL)
    brought = [file for adapter in adapter_paths if (file := adapter / CHAT_TEMPLATE).is_file()]
    if brought:
        tokenizer.chat_template = brought[-1].read_text()
    if not tokenizer.chat_template:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{CHAT}: neither the model's tokenizer nor an adapter has a chat template. Remove it, or choose the result"
            " of a FineTuneJob on conversations",
        )
    tokenizer.save_pretrained(path)
    reader = ChatReader(tokenizer, "assistant", parse_special=True)

    def write(line: Line) -> Line:
        """Return the row with its prompt written. Raises BadRow if the template cannot write it."""
        messages = line["prompt"]
        system = line.get("settings", {}).get("systemPrompt", system_prompt)
        if system and messages[0]["role"] not in SYSTEM_ROLES:
            messages = [{"role": "system", "content": system}, *messages]
        tools = line.get(TOOLS)
        try:
            prompt = reader.render(messages, tools, open_turn=True).text
            if tools and prompt == reader.render(messages, open_turn=True).text:
                raise BadRow(
                    f"{TOOLS}: the chat template leaves them out; remove them, or choose a model that knows tools"
                )
        except Unreadable as error:
            raise BadRow(f"prompt: the chat template cannot write it: {error}") from None
        return {name: value for name, value in line.items() if name != TOOLS} | {"prompt": prompt}

    return write


def check_tokens(
    path: Path,
    spec: GenerateJobSpec,
    field: str,
    found: list[NamedAdapter],
    rows: Iterable[Line],
    folder: WorkspaceFolder,
) -> None:
    """Check that each token of the prompts has a row in the embedding of the model in `path`, or in an adapter.

    Raises Failure if one has none.
    """
    used = [adapter for adapter, given in zip(found, spec.adapters, strict=True) if given.weight != 0]
    adopt_tokenizer(used, folder)
    tokenizer = processors.read_tokenizer(folder.prepared / "tokenizer", field)
    held = {token for adapter, _ in used for token in embedding.tokens_of_adapter(adapter)}
    without = embedding.without_row(inspect.read_config(path, field), tokenizer, spec.task, field)
    beyond = {token: number for token, number in without.items() if number not in held}
    embedding.check(beyond, tokenizer, field, OTHER_TOKENIZER)
    texts = (
        text
        for row in rows
        if "error" not in row
        for role in TASKS[spec.task].generated.columns
        for text in (*_texts(row[role]), *([json.dumps(row[TOOLS])] if TOOLS in row else []))
    )
    embedding.check_prompts(beyond, texts, tokenizer, field, OTHER_TOKENIZER)


def adopt_tokenizer(found: list[NamedAdapter], folder: WorkspaceFolder) -> None:
    """Replace the tokenizer by that of an adapter which holds rows of the embedding for new tokens, with a notice.

    Raises Failure if such an adapter has no tokenizer, and the model no such tokens.
    """
    for adapter, field in found:
        held = embedding.tokens_of_adapter(adapter)
        if not held:
            continue
        own = processors.read_tokenizer(folder.prepared / "tokenizer", MODEL)
        if not (adapter / TOKENIZER).is_file():
            if max(held) < len(own):
                continue
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: the adapter has rows of the embedding for new tokens, and no tokenizer ({TOKENIZER}) that"
                " has them. Save the tokenizer of its training beside it",
            )
        tokenizer = processors.read_tokenizer(adapter, field)
        if tokenizer.get_vocab() != own.get_vocab():
            notice(
                f"{field}: its tokenizer is used, because the adapter has rows of the embedding for {len(held)} tokens."
                f" It has {len(tokenizer)} tokens, that of the model {len(own)}"
            )
            tokenizer.save_pretrained(folder.prepared / "tokenizer")


NamedAdapter = tuple[Path, str]
"""Path of an adapter, and the field of the spec that names it."""


def transformers_model(
    path: Path, spec: GenerateJobSpec, located: sources.Located, rows: Iterable[Line], folder: WorkspaceFolder
) -> Path:
    """Check that the model in `path` can do the task, and save what turns rows into its inputs.

    Returns the folder that the engine loads. Raises Failure if the model does not suit the job.
    """
    task = TASKS[spec.task]
    config = inspect.read_config(path, located.field)
    checks.check_task(config, spec.task, located.field)
    writes = task.auto_model == "CausalLM"
    checks.check_quantisation(config, {"bitsandbytes", "fp8"} if writes else set(), located.field)
    check_memory_settings(config, spec)
    if writes:
        checks.check_new_tokens(config, spec.text.max_new_tokens, "spec.text.maxNewTokens")
    path = weight_check.fitting(path, config, spec.task, located.field, folder, named_by_adapter=False)
    SAVED_PROCESSORS[task.modality](located.folder or path, spec, config, located.field, folder)
    return path


def check_memory_settings(config: PreTrainedConfig, spec: GenerateJobSpec) -> None:
    """Raise Failure if the weights cannot be quantised or wait in the memory of the node, as the job wants."""
    stored = dict(getattr(config, "quantization_config", None) or {}).get("quant_method")
    if spec.model.quantization:
        if stored:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{MODEL}.quantization: the weights are quantised already ({stored}); remove it, or choose the"
                " unquantised model",
            )
        if not spec.resources.gpus:
            remedy = "remove model.quantization, or use a GPU"
            check_quantisable(config, spec.model.quantization.type, f"{MODEL}.quantization", remedy)
        check_layers(config, spec)
    if spec.text and spec.text.offload == "layers" and stored == "bitsandbytes":
        raise Failure(
            ExitCode.INVALID_SPEC,
            "spec.text.offload: packed weights of bitsandbytes stay on the GPU; remove it, or choose the unquantised"
            " model",
        )


def check_layers(config: PreTrainedConfig, spec: GenerateJobSpec) -> None:
    """Raise Failure if `model.quantization` would change no layer, or one that cannot be read on a CPU."""
    from luthier_trainer.models.memory import quantised_layers  # imports torch

    assert spec.model.quantization, "asked by the caller"
    kind, field = spec.model.quantization.type, f"{MODEL}.quantization"
    layers = quantised_layers(inspect.skeleton(config, spec.task, MODEL))
    if not layers:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: bitsandbytes quantises linear layers, and {config.model_type} has none but its head; remove it",
        )
    multiple = QUANTIZATIONS[kind].cpu_multiple
    inputs = {name: getattr(layer, "in_features", layer.weight.shape[0]) for name, layer in layers.items()}
    odd = [f"{name} has {width}" for name, width in inputs.items() if width % multiple]
    if odd and not spec.resources.gpus:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {kind} on CPU needs layers whose inputs are a multiple of {multiple}, and {odd[0]}; remove it,"
            " or use a GPU",
        )


def save_tokenizer(
    source: Path, spec: GenerateJobSpec, config: PreTrainedConfig, field: str, folder: WorkspaceFolder
) -> None:
    """Save the tokenizer in `source`. Raises Failure if it does not suit the job."""
    from luthier_trainer.generation.engines.reading import ReadingEngine  # imports torch

    tokenizer = processors.read_tokenizer(source, field)
    tokenizer.save_pretrained(folder.prepared / "tokenizer")
    engine = engine_class(spec.task)
    if issubclass(engine, ReadingEngine):
        engine.check(spec, config, tokenizer, field)
    if spec.text and (spec.text.json_schema is not None or spec.text.regex is not None):
        check_constraint(spec, tokenizer)


def save_image_processor(
    source: Path, spec: GenerateJobSpec, config: PreTrainedConfig, field: str, folder: WorkspaceFolder
) -> None:
    """Save the image processor in `source`, and what else the engine needs. Raises Failure if it does not suit."""
    from luthier_trainer.generation.engines.looking import LookingEngine  # imports torch

    engine = engine_class(spec.task)
    assert issubclass(engine, LookingEngine), "tasks whose rows hold images look at them"
    engine.prepare(spec, config, source, field, folder)


def save_speech_processor(
    source: Path, spec: GenerateJobSpec, config: PreTrainedConfig, field: str, folder: WorkspaceFolder
) -> None:
    """Save the processor in `source`. Raises Failure if the model does not suit the job."""
    from luthier_trainer.generation.engines.speech import SpeechEngine  # imports torch

    SpeechEngine.prepare(spec, config, source, field, folder)


SAVED_PROCESSORS: Mapping[Modality, Callable[[Path, GenerateJobSpec, PreTrainedConfig, str, WorkspaceFolder], None]] = {
    "text": save_tokenizer,
    "image": save_image_processor,
    "speech": save_speech_processor,
}
"""What rows hold → the function that saves what turns them into inputs of a model of transformers."""


def check_constraint(spec: GenerateJobSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise Failure if the constraint of the texts cannot be used."""
    from luthier_trainer.generation.constraints import Constraints  # imports torch

    try:
        Constraints(tokenizer).matcher(spec.text)
    except ValueError as error:
        raise Failure(ExitCode.INVALID_SPEC, f"spec.{error}") from None


def _texts(prompt: str | list[chats.Message]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def pipeline(
    path: Path, spec: GenerateJobSpec, located: sources.Located, rows: Iterable[Line], folder: WorkspaceFolder
) -> Path:
    """Return `path`, the folder of a diffusers pipeline. Raises Failure if it holds no pipeline."""
    checks.check_pipeline(path, located.field, PIPELINES[spec.task])
    return path


PIPELINES: Mapping[GenerateTask, Collection[str]] = {
    "text-to-image": checks.TEXT_TO_IMAGE,
    "image-to-image": checks.PIPELINES,
}
"""Task → classes of the pipelines that can do it."""


def transformers_model_with_adapters(
    path: Path, spec: GenerateJobSpec, found: list[NamedAdapter], rows: Iterable[Line], field: str
) -> int | None:
    """Return the number of weights of the model. Raises Failure if the adapters cannot be combined, or if neither the
    model nor an adapter has the head that answers.
    """
    folders = [adapter for adapter, _ in found]
    adapters.check_together(folders, spec.adapters, "spec.adapters")
    check_labels(path, spec, [f for f, a in zip(folders, spec.adapters, strict=True) if a.weight != 0], rows, field)
    if TASKS[spec.task].head:
        brought = {name for folder in folders for name in adapters.names_in(folder)}
        weight_check.check_head(path, inspect.read_config(path, field), spec.task, brought, field)
    return weight_files.count(path, field)


def check_labels(path: Path, spec: GenerateJobSpec, used: list[Path], rows: Iterable[Line], field: str) -> None:
    """Check references that are labels. `used`: adapters, which may bring a head with labels of its own.

    Raises Failure if the model has none of the labels.
    """
    if spec.task == "zero-shot-classification":
        assert spec.zero_shot.labels is not None, "the API requires them"
        references.check_labels(rows, spec.zero_shot.labels, references.problem_of(spec))
    if spec.task not in ("text-classification", "token-classification"):
        return
    from luthier_trainer.generation.loading import head_options  # imports torch

    config = inspect.read_config(path, field)
    head = head_options(used)
    names = list(head.get("id2label", config.id2label).values())
    if spec.task == "token-classification":
        references.check_labels(rows, references.types_of(names), None)
    else:
        references.check_labels(rows, names, head.get("problem_type", config.problem_type))


def pipeline_with_adapters(
    path: Path, spec: GenerateJobSpec, found: list[NamedAdapter], rows: Iterable[Line], field: str
) -> int | None:
    """Return the number of weights of the pipeline. Raises Failure if settings or adapters do not suit it."""
    from luthier_trainer.generation import pipelines  # imports torch and diffusers

    return pipelines.check(path, spec, found, rows, field)


CHECKED_MODELS: Mapping[
    str, Callable[[Path, GenerateJobSpec, sources.Located, Iterable[Line], WorkspaceFolder], Path]
] = {
    "transformers": transformers_model,
    "diffusers": pipeline,
}
"""Library → the function that checks its models and returns the folder that the engine loads."""
CHECKED_TOGETHER: Mapping[
    str, Callable[[Path, GenerateJobSpec, list[NamedAdapter], Iterable[Line], str], int | None]
] = {
    "transformers": transformers_model_with_adapters,
    "diffusers": pipeline_with_adapters,
}
"""Library → the function that checks model and adapters together and returns the number of weights."""


def plan_answers(run: GenerateRun, plan: Plan, path: Path, beside: Mapping[str, Path], rows: Iterable[Line]) -> Plan:
    """Return `plan` with what the model needs of the GPU. Raises Failure if that is more than it has."""
    return answer_plan.fitted(run, plan, path, WorkspaceFolder(Path(run.workspace)).prepared / ROWS)


def plan_images(run: GenerateRun, plan: Plan, path: Path, beside: Mapping[str, Path], rows: Iterable[Line]) -> Plan:
    """Return `plan` fitted to the memory of the GPU. Raises Failure if nothing fits."""
    return image_plan.fitted(run, plan, {MODEL: path, **beside}, rows)


PLANNED: Mapping[str, Callable[[GenerateRun, Plan, Path, Mapping[str, Path], Iterable[Line]], Plan]] = {
    "transformers": plan_answers,
    "diffusers": plan_images,
}
"""Library → the function that plans the memory of its models."""


def fetch_adapter(located: sources.Located, into: Path, run: GenerateRun, number: int) -> Path:
    """Fetch an adapter, and return its folder, or its file for images.

    `number`: its index in `spec.adapters`. Raises Failure if it is a complete model instead of an adapter.
    """
    path = located.fetch(into)
    if located.file:
        return path / located.file
    if not sources.holds_adapter(path):
        job = run.spec.adapters[number].job
        remedy = f"use it as spec.model.job: {job}" if job else "use it as spec.model"
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{located.field}: that is a whole model, not an adapter (no {ADAPTER_CONFIG}); {remedy}",
        )
    return path
