"""Recognises the form of rows by their columns: texts, prompts and completions, or conversations.

Which forms there are, and which columns they have, stands in `luthier_api.forms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.forms import FORMS, ROLES, FormInfo, LossOn, RowForm
from luthier_trainer.data import advice, columns
from luthier_trainer.data.load import Rows
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

DATASET = "spec.dataset"
COLUMNS = f"{DATASET}.columns"
LOSS_ON = "spec.training.lossOn"
MAPPED = {
    "sharegpt": "from becomes role, and value becomes content",
    "alpaca": "instruction and input become the user's message, and output the assistant's",
}
"""Forms that are converted → what becomes of their rows."""


@dataclass(frozen=True)
class Form:
    """How rows are read."""

    name: RowForm
    columns: Mapping[str, str]
    """Role → column, of the columns that there are."""

    @property
    def info(self) -> FormInfo:
        return FORMS[self.name]

    @property
    def can_converse(self) -> bool:
        """Whether rows of this form can hold messages."""
        return self.name != "text"


def named_columns(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return role → column, of the roles that the job names."""
    given = {role: getattr(spec.dataset.columns, role) for role in ROLES}
    return {role: column for role, column in given.items() if column is not None}


def wanted(spec: FineTuneJobSpec) -> tuple[str, ...]:
    """Return the columns to read: those of every form that the rows can have."""
    found = [column for form in _possible(spec) for column in _columns(form, named_columns(spec)).values()]
    return tuple(dict.fromkeys(found))


def recognise(rows: Rows, spec: FineTuneJobSpec) -> Form:
    """Return the form of `rows`. It gives notice if their columns fit several forms, or if rows are converted.

    Raises Failure if a column is missing, or if the columns tell no form.
    """
    named, there = named_columns(spec), rows.names or tuple(rows.data.column_names)
    possible = _possible(spec)
    fitting = [form for form in possible if set(_required(form, named)) <= set(there)]
    if not fitting:
        raise _unknown(rows, possible, named, spec)
    name = fitting[0]
    found = {role: column for role, column in _columns(name, named).items() if column in there}
    for role in named:
        columns.require(rows, named[role], f"{COLUMNS}.{role}")
    if name == "prompt-completion" and "label" in there:
        notice(
            f'{COLUMNS}: column "label" of {rows.origin} is not read: all completions are learnt. If it tells good'
            " ones from bad ones, choose task: preference, with spec.preference.lossType: kto"
        )
    _tell(rows, name, [other for other in fitting[1:] if not set(_required(other, named)) <= set(found.values())])
    return Form(name, found)


def loss_on(form: Form, spec: FineTuneJobSpec, origin: str) -> LossOn:
    """Return which tokens are learnt. Raises Failure if the job asks for some that such rows do not have."""
    asked = spec.training.loss_on
    if asked is None:
        return form.info.loss_on[0]
    if asked not in form.info.loss_on:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{LOSS_ON}: {asked} does not apply to {form.info.title}, as which the rows of {origin} are read. Choose"
            f" {' or '.join(form.info.loss_on)}, or remove it",
        )
    return asked


def _possible(spec: FineTuneJobSpec) -> list[RowForm]:
    """Return the forms that have all roles which the job names. Raises Failure if there is none."""
    if spec.dataset.form is not None:
        return [spec.dataset.form]
    named = named_columns(spec)
    found = [name for name, info in FORMS.items() if set(named) <= set(info.columns | info.optional_columns)]
    if not found:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{COLUMNS}: no form of rows has all of {', '.join(named)}. The forms are: {_forms(FORMS)}",
        )
    return found


def _columns(form: RowForm, named: Mapping[str, str]) -> dict[str, str]:
    info = FORMS[form]
    return {role: named.get(role, default) for role, default in (info.columns | info.optional_columns).items()}


def _required(form: RowForm, named: Mapping[str, str]) -> list[str]:
    return [_columns(form, named)[role] for role in FORMS[form].columns]


def _tell(rows: Rows, name: RowForm, others: list[RowForm]) -> None:
    """Give notice if rows are converted, or if they could be read in another form."""
    parts = [f"{DATASET}: the rows of {rows.origin} are read as {FORMS[name].title}"]
    if name in MAPPED:
        parts.append(f": {MAPPED[name]}")
    if others:
        parts.append(f". Their columns also fit {', '.join(others)}; set dataset.form to choose")
    if len(parts) > 1:
        notice("".join(parts))


def _unknown(rows: Rows, possible: list[RowForm], named: Mapping[str, str], spec: FineTuneJobSpec) -> Failure:
    """Return the Failure for rows without the columns of any form. Raises it if a single column is to blame."""
    there = rows.names or tuple(rows.data.column_names)
    likely: RowForm = "text" if "text" in possible else possible[0]
    if spec.dataset.form or named:
        for role, column in _columns(likely, named).items():
            if role in FORMS[likely].columns:
                columns.require(rows, column, f"{COLUMNS}.{role}")
    if rows.hint and len(there) == 1:
        columns.require(rows, FORMS[likely].columns["text"], f"{COLUMNS}.text")
    what = f"{COLUMNS}: {rows.origin} has no columns by which its rows could be read (columns: {', '.join(there)})"
    known = rows.hint or advice.unknown_form(rows, there, COLUMNS)
    return columns.invalid(f"{what}. {known or f'Name them in {COLUMNS}. The forms of rows are: {_forms(possible)}'}")


def _forms(names: Mapping[RowForm, FormInfo] | list[RowForm]) -> str:
    """Return the forms and the roles of their columns, for a message."""
    return "; ".join(f"{name} ({', '.join(FORMS[name].columns)})" for name in names)
