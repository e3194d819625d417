"""`prepare` of a GenerateJob: fetches and checks model and adapters, and writes the rows with seeds to `rows.jsonl`.

The seed of a row is the one in its data, or the first 32 bits of BLAKE2b over "<job seed>:<row number>". It does not
depend on shards or on the order of processing, so that each output can be made again alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, Origin, PreparedRecord
from luthier_api.spec import ModelSource
from luthier_api.status import ResolvedDataset
from luthier_api.tasks import GENERATION_TASKS, generation_tasks
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import chats, columns
from luthier_trainer.data.load import Loader, Rows
from luthier_trainer.data.masks import ChatReader, Unreadable
from luthier_trainer.data.remote import without_query
from luthier_trainer.data.stores import refuse_unused
from luthier_trainer.models import adapters, checks, embedding, inspect, processors, sources, weight_check, weight_files
from luthier_trainer.models.materialize import whole_model
from luthier_trainer.prepare import carried_columns
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace import provenance
from luthier_trainer.workspace.manifest import fsync
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG
from luthier_trainer.workspace.plan import plan_generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, INPUTS, CHAT = "spec.model", "spec.inputs", "spec.text.chat"
TOKENIZER = "tokenizer_config.json"  # where transformers saves the class of a tokenizer
CHAT_TEMPLATE = "chat_template.jinja"  # where transformers saves the template of a tokenizer
SEED_LIMIT = 2**32
OPTIONAL_COLUMNS = {
    role: column for task in GENERATION_TASKS.values() for role, column in task.optional_columns.items()
}
"""Role → default name of its column, for all tasks, so that an unsupported column of another task is noticed, too."""
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
    with_negative_prompts = generation_tasks(lambda task: "inputs.columns.negativePrompt" in task.fields)
    if spec.task not in with_negative_prompts and any("negativePrompt" in row for row in rows):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{INPUTS}: only {', '.join(with_negative_prompts)} has negative prompts; remove them for {spec.task}",
        )

    path = whole_model(located, run, folder, run.spec.model.job, "model")
    path = CHECKED_MODELS[spec.task](path, spec, located, rows, folder)
    paths = [fetch_adapter(a, folder.prepared / "adapters" / str(i), run, i) for i, a in enumerate(found)]
    for i, adapter in enumerate(paths):
        adapters.check(
            adapter.parent if found[i].file else adapter, spec.adapters[i].job, found[i].field, run, located, path
        )
    fields = [adapter.field for adapter in found]
    refiner = locate_refiner(run)
    refiner_path = refiner.fetch(folder.prepared / "refiner") if refiner else None
    parameters = CHECKED_TOGETHER[spec.task](path, spec, list(zip(paths, fields, strict=True)), rows, located.field)
    if refiner_path:
        parameters = (parameters or 0) + check_refiner(refiner_path, path, spec)

    if spec.task == "text-generation":
        check_tokens(path, spec, located.field, list(zip(paths, fields, strict=True)), rows, folder)
    if spec.task == "text-generation" and spec.text.chat:
        write_chats(rows, paths, folder)
    others = (located, *found, *([refiner] if refiner else []))
    target = folder.prepared / "rows.jsonl"
    with target.open("w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    fsync(target)
    return PreparedRecord(
        model=located.resolved,
        dataset=inputs,
        adapters=[a.resolved for a in found],
        plan=plan_generation(len(rows), spec.shards, spec.precision, spec.resources.gpus, parameters),
        model_path=str(path),
        adapter_paths=[str(p) for p in paths],
        other_model_paths=[str(refiner_path)] if refiner_path else [],
        refiner=refiner.resolved if refiner else None,
        origins=[*(origin for source in others for origin in source.origins), *read],
        dataset_path=str(target),
    )


def locate_refiner(run: GenerateRun) -> sources.Located | None:
    """Return where the refiner of `image.refiner` is; None if the job has none."""
    given = run.spec.image.refiner if run.spec.task == "text-to-image" else None
    if given is None:
        return None
    source = ModelSource(id=given.id, revision=given.revision, path=given.path)
    return sources.locate(source, run, "spec.image.refiner")


def check_refiner(refiner: Path, base: Path, spec: GenerateJobSpec) -> int:
    """Return the number of weights of the refiner. Raises Failure if it does not suit the pipeline in `base`."""
    from luthier_trainer.generation import pipelines  # imports torch and diffusers

    return pipelines.check_refiner(refiner, base, spec.image)


def write_chats(rows: list[Line], adapter_paths: list[Path], folder: WorkspaceFolder) -> None:
    """Write the messages of each row as a prompt, with the chat template that the engine's tokenizer then has.

    The template of the last adapter that has one comes before that of the model. Raises Failure if there is none, or if
    it cannot write the messages of a row.
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
    for row in rows:
        messages = row["prompt"]
        try:
            row["prompt"] = reader.render(messages, open_turn=True).text
        except Unreadable as error:
            raise columns.invalid(
                f"{INPUTS}: row {row['row']} cannot be written by the chat template: {error}"
            ) from None


def check_tokens(
    path: Path, spec: GenerateJobSpec, field: str, found: list[NamedAdapter], rows: list[Line], folder: WorkspaceFolder
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
    texts = (text for row in rows for text in _texts(row["prompt"]))
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


Line = dict[str, Any]
"""A line of `rows.jsonl`."""
NamedAdapter = tuple[Path, str]
"""Path of an adapter, and the field of the spec that names it."""


def language_model(
    path: Path, spec: GenerateJobSpec, located: sources.Located, rows: list[Line], folder: WorkspaceFolder
) -> Path:
    """Check that the model in `path` can generate text from the prompts of `rows`, and save its tokenizer.

    Returns the folder that the engine loads. Raises Failure if the model does not suit the job.
    """
    config = inspect.read_config(path, located.field)
    checks.check_task(config, spec.task, located.field)
    checks.check_quantisation(config, {"bitsandbytes", "fp8"}, located.field)
    checks.check_new_tokens(config, spec.text.max_new_tokens, "spec.text.maxNewTokens")
    path = weight_check.fitting(path, config, spec.task, located.field, folder, named_by_adapter=False)
    tokenizer = processors.read_tokenizer(located.folder or path, located.field)
    tokenizer.save_pretrained(folder.prepared / "tokenizer")
    if spec.text.json_schema is not None or spec.text.regex is not None:
        check_constraint(spec, tokenizer)
    return path


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
    path: Path, spec: GenerateJobSpec, located: sources.Located, rows: list[Line], folder: WorkspaceFolder
) -> Path:
    """Return `path`, the folder of a diffusers pipeline. Raises Failure if it holds no pipeline."""
    checks.check_pipeline(path, located.field)
    return path


def language_model_with_adapters(
    path: Path, spec: GenerateJobSpec, found: list[NamedAdapter], rows: list[Line], field: str
) -> int | None:
    """Return the number of weights of the model. Raises Failure if the adapters cannot be combined."""
    adapters.check_together([adapter for adapter, _ in found], spec.adapters, "spec.adapters")
    return weight_files.count(path, field)


def pipeline_with_adapters(
    path: Path, spec: GenerateJobSpec, found: list[NamedAdapter], rows: list[Line], field: str
) -> int | None:
    """Return the number of weights of the pipeline. Raises Failure if settings or adapters do not suit it."""
    from luthier_trainer.generation import pipelines  # imports torch and diffusers

    return pipelines.check(path, spec, found, rows, field)


CHECKED_MODELS: Mapping[str, Callable[[Path, GenerateJobSpec, sources.Located, list[Line], WorkspaceFolder], Path]] = {
    "text-generation": language_model,
    "text-to-image": pipeline,
}
"""Task → the function that checks its model and returns the folder that the engine loads."""
CHECKED_TOGETHER: Mapping[str, Callable[[Path, GenerateJobSpec, list[NamedAdapter], list[Line], str], int | None]] = {
    "text-generation": language_model_with_adapters,
    "text-to-image": pipeline_with_adapters,
}
"""Task → the function that checks model and adapters together and returns the number of weights."""


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


def read_inputs(run: GenerateRun, cache: Path) -> tuple[list[dict[str, Any]], ResolvedDataset, tuple[Origin, ...]]:
    """Return the lines for `rows.jsonl`, the resolved dataset, and the provenance of its files."""
    inputs = run.spec.inputs
    refuse_unused(run.spec.stores, inputs.dataset)
    if inputs.dataset is None:
        given: list[dict[str, Any]] = [
            {"prompt": row.prompt, "negativePrompt": row.negative_prompt, "seed": row.seed} for row in inputs.rows or []
        ]
        for cell in given if is_chat(run) else ():
            cell["prompt"] = [{"role": "user", "content": cell["prompt"]}]
        return (
            [numbered(i, row, run.spec.seed) for i, row in enumerate(given)],
            ResolvedDataset(source="inline", rows=len(given)),
            (),
        )
    assert inputs.columns is not None, "every dataset has columns"
    loader = Loader(
        inputs.dataset, f"{INPUTS}.dataset", cache, columns=(inputs.columns.prompt,), stores=run.spec.stores
    )
    rows = loader.split(inputs.dataset.split, "split")
    source = inputs.dataset.id or ", ".join(map(without_query, inputs.dataset.files or []))
    revision = provenance.combined(origin.digest for origin in rows.origins) if rows.origins else rows.revision
    found = [numbered(i, row, run.spec.seed) for i, row in enumerate(cells(rows, run))]
    return found, ResolvedDataset(source=source[:300], revision=revision, rows=len(found)), rows.origins


def is_chat(run: GenerateRun) -> bool:
    """Return whether prompts are messages, which a chat template writes."""
    return run.spec.task == "text-generation" and run.spec.text.chat


def cells(rows: Rows, run: GenerateRun) -> Iterator[dict[str, Any]]:
    """Yield prompt, negative prompt, seed and the columns to copy of each row. Text files hold one prompt per line."""
    names = run.spec.inputs.columns
    assert names is not None, "every dataset has columns"
    prompt = names.prompt
    if set(rows.data.column_names) == {"text"} and prompt == GENERATION_TASKS[run.spec.task].columns["prompt"]:
        prompt = "text"
    negative_prompt = names.negative_prompt or OPTIONAL_COLUMNS["negativePrompt"]
    columns.require(rows, prompt, f"{INPUTS}.columns.prompt")
    messages: Iterator[Any] = iter(())
    if is_chat(run):
        messages = chats.prompts(rows, prompt, f"{INPUTS}.columns.prompt")
    else:
        columns.texts(rows, prompt, f"{INPUTS}.columns.prompt", drop_blank=False)
    has_negative = optional(rows, negative_prompt, "negativePrompt")
    if has_negative:
        columns.require_text(rows, negative_prompt, f"{INPUTS}.columns.negativePrompt")
    has_seed = optional(rows, names.seed, "seed")
    roles = [prompt, *([negative_prompt] if has_negative else []), *([names.seed] if has_seed else [])]
    others = carried_columns.columns(rows, names.carry, roles, f"{INPUTS}.columns.carry")
    lines = carried_columns.lines(rows)
    for i, row in enumerate(rows.data.select_columns([*roles, *others])):
        yield {
            "prompt": next(messages, row[prompt]),
            "negativePrompt": row[negative_prompt] if has_negative else None,
            "seed": whole_seed(row[names.seed], i, rows.origin) if has_seed else None,
            "input": {**next(lines, {}), **{name: carried_columns.plain(row[name], others[name]) for name in others}}
            or None,
        }


def optional(rows: Rows, column: str, role: str) -> bool:
    """Return whether `column` exists. Raises Failure if the user named a column that does not exist."""
    if column != OPTIONAL_COLUMNS[role]:
        columns.require(rows, column, f"{INPUTS}.columns.{role}")
    return column in rows.data.column_names


def whole_seed(value: Any, row: int, origin: str) -> int | None:
    """Return the seed in a cell; None if the cell is empty. Raises Failure if it is not an unsigned 32-bit integer."""
    if value is None or value == "":
        return None
    try:
        seed = int(value)
        fits = not isinstance(value, bool) and 0 <= seed < SEED_LIMIT and float(value) == seed
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise columns.invalid(
            f"{INPUTS}.columns.seed: row {row} of {origin} has the seed {value!r}; a seed is a whole number from 0 to"
            " 2^32 - 1"
        )
    return seed


def numbered(row: int, cell: dict[str, Any], job_seed: int) -> dict[str, Any]:
    """Return the line of `rows.jsonl` for row number `row` with the given cells."""
    own = cell["seed"]
    line = {"row": row, "prompt": cell["prompt"], "seed": derive_seed(job_seed, row) if own is None else own}
    # An empty cell and an empty text in a manifest both mean that there is no value.
    optional_cells = {"negativePrompt": cell["negativePrompt"] or None, "input": cell.get("input")}
    return line | {name: value for name, value in optional_cells.items() if value is not None}


def derive_seed(job_seed: int, row: int) -> int:
    """Return the 32-bit seed of a row that has none of its own."""
    return int.from_bytes(hashlib.blake2b(f"{job_seed}:{row}".encode(), digest_size=4).digest(), "big")
