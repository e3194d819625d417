"""Reads the rows of a GenerateJob from the spec or from a dataset, each as the contents of its roles.

A row that cannot be read has the reason under `error`, and what could be read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_api.tasks import GENERATION_TASKS, REFERENCE, TOOLS, generation_tasks
from luthier_trainer.data import chats, columns
from luthier_trainer.data.load import Rows
from luthier_trainer.generation.overrides import read_overrides
from luthier_trainer.generation.rows import Line
from luthier_trainer.prepare import carried_columns, generation_files, other_job, references, sweeps
from luthier_trainer.prepare.bad_rows import BadRow
from luthier_trainer.prepare.sweeps import Template
from luthier_trainer.runtime.failure import Failure

INPUTS = "spec.inputs"
SEED_LIMIT = 2**32
OPTIONAL_COLUMNS = {
    role: column for task in GENERATION_TASKS.values() for role, column in task.optional_columns.items()
}
"""Role → default name of its column, for all tasks, so that an unsupported column of another task is noticed, too."""
ABOUT_THE_ROW = ("seed", "id")
"""Roles of columns that are no input of the task."""
DIGEST = "sha256"
"""Column of the outputs of another job with the SHA-256 of an image."""
TEXTS = "texts"
"""Key of a line that was read: its texts for the template."""


def named(run: GenerateRun) -> dict[str, str]:
    """Return role → name of its column, of all roles of the job's task."""
    names = run.spec.inputs.columns
    assert names is not None, "every dataset has columns"
    given: dict[str, Any] = names.dump()
    return {role: given[role] for role in (*GENERATION_TASKS[run.spec.task].roles, "id") if given.get(role)}


def required_roles(run: GenerateRun) -> list[str]:
    """Return the roles that each row of the job must have."""
    templated = {"prompt"} if run.spec.inputs.template else set()
    return [role for role in GENERATION_TASKS[run.spec.task].columns if role not in templated]


def inline(run: GenerateRun) -> Iterator[Line]:
    """Yield the rows that are written in the spec."""
    task = GENERATION_TASKS[run.spec.task]
    for row in run.spec.inputs.rows or []:
        given: dict[str, Any] = row.dump()
        line: Line = {role: given[role] for role in (*task.columns, *task.optional_columns, "id") if given.get(role)}
        if row.reference:
            take_reference(run, row.reference, line)
        if "seed" in given:
            line["seed"] = given["seed"]
        if TOOLS in line:
            try:
                found = tools(line.pop(TOOLS), nested=False)
            except BadRow as problem:
                line["error"], found = f"{TOOLS}: {problem}", None
            line |= {TOOLS: found} if found else {}
        if run.spec.inputs.template:
            line[TEXTS] = {**given.get("fields", {}), **({"prompt": row.prompt} if row.prompt else {})}
            line.pop("prompt", None)
        elif is_chat(run):
            line["prompt"] = [{"role": "user", "content": line["prompt"]}]
        if row.fields:
            line["input"] = dict(row.fields)
        read_files(line, run)
        if overrides := given.get("overrides", {}).get(task.settings):
            line["settings"] = overrides
        yield line


def read_files(line: Line, run: GenerateRun) -> None:
    """Put the SHA-256 of each file of a row that is written in the spec in place of its path, or the error."""
    for role in [role for role in generation_files.KINDS if role in line]:
        name = line.pop(role)
        line["input"] = {**line.get("input", {}), role: name}
        try:
            line[role] = generation_files.kept(role, name, run, folder=None)
        except generation_files.BadFile as problem:
            line["error"] = f"{role}: {problem}"


def take_reference(run: GenerateRun, value: Any, line: Line) -> None:
    """Add the reference in a cell to a line, or the reason why it cannot be read."""
    try:
        found = references.reference(run.spec.task, value, line)
    except BadRow as problem:
        line["error"] = "; ".join([*([line["error"]] if "error" in line else []), f"{REFERENCE}: {problem}"])
        return
    if found is not None:
        line[REFERENCE] = found


def is_chat(run: GenerateRun) -> bool:
    """Return whether prompts are messages, which a chat template writes."""
    return run.spec.task == "text-generation" and run.spec.text.chat


def cells(rows: Rows, run: GenerateRun) -> Iterator[Line]:
    """Yield the line of each row of a dataset. Text files hold one prompt per line."""
    task, names = GENERATION_TASKS[run.spec.task], run.spec.inputs.columns
    assert names is not None, "every dataset has columns"
    refuse_negative_prompts(rows, run)
    roles = named(run)
    if set(rows.data.column_names) == {"text"} and roles.get(task.main_role) == task.columns[task.main_role]:
        roles[task.main_role] = "text"
    template = Template.of(run.spec.inputs.template) if run.spec.inputs.template else None
    texts = [name for name in template.names if name not in swept(run)] if template else []
    for column in texts:
        columns.require(rows, column, sweeps.TEMPLATE)
    overridden = names.settings or {}
    for name, column in overridden.items():
        columns.require(rows, column, f"{INPUTS}.columns.settings.{name}")
    if template:
        roles.pop("prompt", None)
    roles = {role: column for role, column in roles.items() if is_there(rows, role, column, task.optional_columns)}
    compared = roles.pop(REFERENCE, None)
    cell_of_reference = carried_columns.reader(rows, compared, references.FIELD) if compared else None
    files = {role: column for role, column in roles.items() if role in generation_files.KINDS}
    rows = generation_files.encoded(rows, files)
    read = {role: reader_of(rows, run, role, column) for role, column in roles.items()}
    taken = [*roles.values(), *overridden.values(), *([compared] if compared else [])]
    others = carried_columns.columns(rows, names.carry, taken, f"{INPUTS}.columns.carry")
    lines = carried_columns.lines(rows)
    outcome = other_job.ERROR if run.spec.inputs.job else None
    others = {name: kind for name, kind in others.items() if name != outcome}
    kept = [*taken, *texts, *others, *([outcome, DIGEST] if outcome else [])]
    for row in rows.data.select_columns(list(dict.fromkeys(kept))):
        line: Line = {}
        problems = []
        if outcome and row[outcome] is not None:
            problems.append(f"{run.spec.inputs.job} could not make it: {row[outcome]}")
        for role, column in roles.items():
            try:
                value = read[role](row[column])
            except (BadRow, generation_files.BadFile) as problem:
                problems.append(f"{role}: {problem}")
                value = None if role in (*ABOUT_THE_ROW, TOOLS, *files) else plain_text(row[column])
            if value is not None:
                line[role] = value
        written = [role for role, column in files.items() if outcome and column == other_job.FILE_NAME]
        if not problems and any(line[role] != row[DIGEST] for role in written):
            problems.append(f"the image is not as {run.spec.inputs.job} has written it")
        carried = {name: carried_columns.plain(row[name], others[name]) for name in others}
        found = {column: generation_files.name_of(row[column]) for column in files.values()}
        paths = {column: path for column, path in found.items() if path}
        if more := {**next(lines, {}), **paths, **carried}:
            line["input"] = more
        if template:
            line[TEXTS] = {name: plain_text(row[name]) for name in texts if row[name] not in (None, "")}
        try:
            values = {name: row[column] for name, column in overridden.items()}
            if values and (found := read_overrides(task.settings, values)):
                line["settings"] = found
        except ValueError as problem:
            problems.append(str(problem))
        if problems:
            line["error"] = "; ".join(problems)
        if cell_of_reference:
            take_reference(run, cell_of_reference(row[compared]), line)
        yield line


def swept(run: GenerateRun) -> set[str]:
    """Return the names of the texts that a sweep has for the template."""
    sweep = run.spec.inputs.sweep
    values = (sweep.zip or sweep.product) if sweep else None
    return set(values.fields or {}) if values else set()


def plain_text(value: Any) -> str:
    """Return a cell that cannot be read, for the record of its error."""
    return value if isinstance(value, str) else "" if value is None else str(value)


def refuse_negative_prompts(rows: Rows, run: GenerateRun) -> None:
    """Raise Failure if the data has negative prompts, and the task none."""
    with_them = generation_tasks(lambda task: "negativePrompt" in task.optional_columns)
    has_prompts = "prompt" in GENERATION_TASKS[run.spec.task].columns
    if has_prompts and run.spec.task not in with_them and OPTIONAL_COLUMNS["negativePrompt"] in rows.data.column_names:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{INPUTS}: negative prompts are for {' and '.join(with_them)}; remove them for {run.spec.task}",
        )


def is_there(rows: Rows, role: str, column: str, optional: Mapping[str, str | None]) -> bool:
    """Return whether the column of a role exists. Raises Failure if the task needs it, or if the user has named it."""
    if optional.get(role) != column:
        columns.require(rows, column, f"{INPUTS}.columns.{role}")
    return column in rows.data.column_names


def reader_of(rows: Rows, run: GenerateRun, role: str, column: str) -> Callable[[Any], Any]:
    """Return the function that reads the cells of a role; it raises BadRow for one that cannot be read.

    Raises Failure if the column cannot hold the role at all.
    """
    if role == "seed":
        return whole_seed
    if role == "id":
        return identifier
    if role in generation_files.KINDS:
        optional = role in GENERATION_TASKS[run.spec.task].optional_columns
        return generation_files.reader(rows, run, role, column, f"{INPUTS}.columns.{role}", optional)
    if role == "prompt" and is_chat(run):
        nested = chats.is_nested(rows, column)
        return lambda value: messages(value, nested)
    if role == TOOLS:
        lists = chats.is_nested(rows, column)
        return lambda value: tools(value, lists, f'column "{column}": ')
    columns.require_text(rows, column, f"{INPUTS}.columns.{role}")
    return optional_text if role in GENERATION_TASKS[run.spec.task].optional_columns else some_text


def some_text(value: Any) -> str:
    """Return a text. Raises BadRow if it is blank."""
    if not value or not value.strip():
        raise BadRow("blank; write a text")
    return str(value)


def optional_text(value: Any) -> str | None:
    """Return a text; None if the cell is empty."""
    return value or None


def messages(value: Any, nested: bool) -> list[chats.Message]:
    """Return the messages in a cell; a text is the message of a user. Raises BadRow if there are none."""
    try:
        return chats.prompt_of(value, nested)
    except chats.Malformed as error:
        raise BadRow(str(error)) from None


def tools(value: Any, nested: bool, subject: str = "") -> list[dict[str, Any]] | None:
    """Return the tools in a cell; None if it is empty. Raises BadRow, with `subject`, if it holds something else."""
    try:
        return chats.tools_in(value, nested) or None
    except chats.Malformed as error:
        raise BadRow(f"{subject}{str(error).removeprefix(f'{TOOLS}: ')}") from None


def identifier(value: Any) -> str:
    """Return the identifier of a row as text. Raises BadRow if the cell is empty."""
    if value is None or value == "":
        raise BadRow("empty; give each row an identifier, or remove inputs.columns.id")
    return str(value)


def whole_seed(value: Any) -> int | None:
    """Return the seed in a cell; None if the cell is empty. Raises BadRow if it is not an unsigned 32-bit integer."""
    if value is None or value == "":
        return None
    try:
        seed = int(value)
        fits = not isinstance(value, bool) and 0 <= seed < SEED_LIMIT and float(value) == seed
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise BadRow(f"{value!r} is no seed, which is a whole number from 0 to 2^32 - 1")
    return seed
