"""The API as a user meets it where there is no API server: what is refused, and with which words.

`cases.api` has the table of the rules; the tests of the cluster apply it to a real API server.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import cel
import pytest
from cases.api import (
    CASES,
    EXISTING,
    FINE_TUNE,
    FIXED,
    GENERATE,
    LIVE,
    PYTHON,
    STRANGE,
    TRACKED,
    WHILE_STOPPED,
    WRITTEN,
    Case,
    Change,
    Document,
    FixedCase,
    StrangeCase,
    Written,
    all_rules,
    changed,
    schemas,
    specified,
    stored,
    words,
)

from luthier_api import crd, drawn, metrics
from luthier_api.base import Rule
from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.kinds import KINDS, FineTuneJob, GenerateJob, JobKind, parse_job
from luthier_api.marks import marked_fields, rules_of, settings_of
from luthier_api.metrics import (
    POD_METRICS,
    checkpoint_step,
    generation_progress,
    read_samples,
    training_progress,
)
from luthier_api.ruleset import rules_of_blocks
from luthier_api.status import JobStatus
from luthier_api.termination import TerminationMessage
from luthier_api.terminationlog import LIMIT_BYTES
from luthier_api.validation import InvalidJob, check_job


def tune(**spec: Any) -> Document:
    return changed(FINE_TUNE, {f"spec.{field}": value for field, value in spec.items()})


def make(**spec: Any) -> Document:
    return changed(GENERATE, {f"spec.{field}": value for field, value in spec.items()})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.message)
def test_each_rule_accepts_one_manifest_and_refuses_another(case: Case) -> None:
    check_job(changed(case.base, case.accepted))
    with pytest.raises(InvalidJob) as refused:
        check_job(changed(case.base, case.refused))
    told = [re.sub(r"\[\d+\]", "", problem) for problem in refused.value.problems]
    assert [p for p in told if p.startswith(("spec.", "metadata.")) and case.message in p] != []


@pytest.mark.parametrize(
    ("written", "text"), [(w, t) for w in WRITTEN for t in w.refused], ids=lambda v: getattr(v, "field", repr(v))
)
def test_a_text_is_refused_with_words(written: Written, text: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        check_job(changed(written.base, written.change(text)))
    (problem,) = refused.value.problems
    assert problem.startswith(written.begins)
    assert problem.endswith(f": {words()[written.field]} (it is {text!r})")


@pytest.mark.parametrize(
    ("written", "text"), [(w, t) for w in WRITTEN for t in w.accepted], ids=lambda v: getattr(v, "field", repr(v))
)
def test_a_text_passes(written: Written, text: str) -> None:
    check_job(changed(written.base, written.change(text)))


def test_every_field_with_a_format_has_texts() -> None:
    assert words().keys() == {w.field for w in WRITTEN}


def broken_by_update(before: Document, after: Document) -> list[str]:
    """What the API server would say, as far as the spec's own rules go."""
    rules = rules_of(KINDS[JobKind(after["kind"])].spec)
    values = {"self": stored(after)["spec"], "oldSelf": stored(before)["spec"]}
    return [rule.message for rule in rules if rule.transition and cel.evaluate(rule.cel, values) is not True]


@pytest.mark.parametrize("case", FIXED, ids=lambda case: f"{case.base['kind']}.{case.field}")
def test_fields_that_never_change(case: FixedCase) -> None:
    assert broken_by_update(case.base, changed(case.base, case.change)) == [
        f"spec.{case.field} cannot change once the job exists{f', except {case.excepted}' if case.excepted else ''};"
        f" create another job for another {case.field}"
    ]


@dataclass(frozen=True)
class StoppedCase:
    name: str
    before: Change
    after: Change
    passes: bool


STOPPED = [
    StoppedCase(
        name="at work",
        before={"status.state": "Running"},
        after={},
        passes=False,
    ),
    StoppedCase(
        name="without any status",
        before={},
        after={},
        passes=False,
    ),
    StoppedCase(
        name="suspended by the same change",
        before={"status.state": "Running"},
        after={"spec.suspend": True},
        passes=True,
    ),
    StoppedCase(
        name="resumed by the same change",
        before={"spec.suspend": True, "status.state": "Suspended"},
        after={"spec.suspend": False},
        passes=True,
    ),
    StoppedCase(
        name="failed",
        before={"status.state": "Failed"},
        after={},
        passes=True,
    ),
    StoppedCase(
        name="planned",
        before={"status.state": "Planned"},
        after={},
        passes=True,
    ),
    StoppedCase(
        name="complete",
        before={"status.state": "Complete"},
        after={},
        passes=False,
    ),
]


@pytest.mark.parametrize("kind", WHILE_STOPPED)
@pytest.mark.parametrize("case", STOPPED, ids=lambda case: case.name)
def test_fields_that_change_while_no_pods_work_with_them(kind: str, case: StoppedCase) -> None:
    existing = changed(EXISTING[kind], {"spec.suspend": False} | case.before)
    rules = [rule for rule in KINDS[JobKind(kind)].model.rules if rule.transition]
    whole = {"status": existing.get("status", {})}
    for path, value in WHILE_STOPPED[kind].items():
        after = changed(existing, {path: value} | case.after)
        assert broken_by_update(existing, after) == [], "no rule of the spec alone refuses it"
        values = {"self": stored(after) | whole, "oldSelf": stored(existing) | whole}
        refused = [rule.message for rule in rules if cel.evaluate(rule.cel, values) is not True]
        expect = [] if case.passes else [f"{path} cannot change while pods work with it"]
        assert [message.partition(";")[0] for message in refused] == expect


@pytest.mark.parametrize("base", [FINE_TUNE, GENERATE], ids=["FineTuneJob", "GenerateJob"])
def test_a_status_write_passes_all_rules_of_updates(base: Document) -> None:
    """Also of a job that leaves out whatever it may: a rule that reads a missing field is an error, and refuses it."""
    job = stored(base)
    assert broken_by_update(base, base) == []
    for rule in KINDS[JobKind(base["kind"])].model.rules:
        if rule.transition:
            assert cel.evaluate(rule.cel, {"self": job, "oldSelf": job}) is True, rule.message


@pytest.mark.parametrize("kind", LIVE)
def test_fields_that_may_change(kind: str) -> None:
    before, after = EXISTING[kind], changed(EXISTING[kind], LIVE[kind])
    assert broken_by_update(before, after) == []
    old, new = (parse_job(d).spec.dump() for d in (before, after))
    assert {f"spec.{name}" for name in new if new[name] != old.get(name)} == LIVE[kind].keys()


@pytest.mark.parametrize("base", [FINE_TUNE, GENERATE], ids=["FineTuneJob", "GenerateJob"])
def test_each_field_either_may_change_or_never_does(base: Document) -> None:
    changing = LIVE[base["kind"]] | WHILE_STOPPED[base["kind"]]
    inner = {path.removeprefix("spec.") for path in changing if path.count(".") > 1}
    live = {path.removeprefix("spec.") for path in changing} - inner
    fixed = {case.field for case in FIXED if case.base["kind"] == base["kind"]}
    assert live & fixed == set()
    assert live | fixed == {f.alias or n for n, f in type(parse_job(base).spec).model_fields.items()}
    told = {r.message.split()[0].removeprefix("spec.") for r in rules_of(type(parse_job(base).spec)) if r.transition}
    assert fixed == told


def test_a_block_of_another_task_gets_one_message() -> None:
    """Whatever else is wrong in it."""
    grpo = {"rewards": [PYTHON], "generations": 3, "maxCompletionLength": 5000}
    document = changed(FINE_TUNE, {"spec.task": "reward", "spec.grpo": grpo, "spec.tracking": [TRACKED]})
    with pytest.raises(InvalidJob) as refused:
        check_job(document)
    assert refused.value.problems == ["spec.grpo: applies to grpo; remove it, or choose that task"]


def test_the_tables_cover_all_rules() -> None:
    told = [c.message for c in CASES] + [f"spec.{c.field} cannot change" for c in FIXED]
    told += [f"{path} cannot change while" for changes in WHILE_STOPPED.values() for path in changes]
    assert [rule.message for rule in all_rules() if not any(rule.message.startswith(t) for t in told)] == []


@pytest.mark.parametrize("rule", list(all_rules()), ids=lambda rule: rule.message[:40])
def test_messages_begin_with_a_field_and_say_what_to_do(rule: Rule) -> None:
    path, _, advice = rule.message.partition(" cannot change" if rule.transition else ": ")
    assert advice
    assert " " not in path


@dataclass(frozen=True)
class ShapeCase:
    name: str
    document: Document
    expect: str


SHAPES = [
    ShapeCase(
        name="an unknown field",
        document=tune(trainning={"epochs": 1}),
        expect="spec.trainning: unknown field. Did you mean 'training'?",
    ),
    ShapeCase(
        name="an unknown field below",
        document=tune(method={"ranks": 4}),
        expect="spec.method.ranks: unknown field. Did you mean 'rank'?",
    ),
    ShapeCase(
        name="nothing like it",
        document=tune(zebra=1),
        expect="spec.zebra: unknown field",
    ),
    ShapeCase(
        name="a field is missing",
        document=make(inputs=None),
        expect="spec.inputs: required",
    ),
    ShapeCase(
        name="an unknown task",
        document=tune(task="poetry"),
        expect=(
            "spec.task: input should be 'causal-lm', 'seq2seq', 'preference', 'text-classification',"
            " 'token-classification', 'question-answering', 'masked-lm', 'embedding', 'reward', 'grpo',"
            " 'image-classification', 'audio-classification', 'speech-recognition' or 'text-to-image' (it is 'poetry')"
        ),
    ),
    ShapeCase(
        name="a number out of range",
        document=tune(training={"learningRate": 2}),
        expect="spec.training.learningRate: input should be less than or equal to 1 (it is 2)",
    ),
    ShapeCase(
        name="an element of a list",
        document=make(inputs={"rows": [{"prompt": ""}]}),
        expect="spec.inputs.rows[0].prompt: string should have at least 1 character (it is '')",
    ),
    ShapeCase(
        name="more rows than a handful, in characters of several bytes",
        document=make(inputs={"rows": [{"prompt": "é" * 8000}] * 9}),
        expect=(
            "spec.inputs.rows: more than 65536 characters in all; put the rows into a file and name it in"
            " inputs.dataset.files: of a ConfigMap or a claim (spec.volumes), or of a dataset (inputs.dataset.id)"
        ),
    ),
    ShapeCase(
        name="a rule, with its place in a list",
        document=make(adapters=[{"id": "a/b"}, {"path": "/x"}, {"id": "a/b", "path": "/y"}]),
        expect="spec.adapters[2]: set exactly one of job, id and path",
    ),
    ShapeCase(
        name="a rule on a field of it",
        document=make(adapters=[{"id": "a/b"}, {"path": "/y", "revision": "v1"}]),
        expect="spec.adapters[1].revision: only an adapter of the Hub has revisions",
    ),
    ShapeCase(
        name="a rule below a list",
        document=tune(volumes=[{"claimName": "a", "mountPath": "/a"}, {"claimName": "b", "mountPath": "/tmp"}]),
        expect="spec.volumes[1].mountPath: that folder belongs to the pod; choose one such as /data or /models",
    ),
    ShapeCase(
        name="a rule two levels down",
        document=make(inputs={"dataset": {"id": "a/b", "format": "csv"}}),
        expect="spec.inputs.dataset.format: belongs to dataset.files; a Hub dataset knows its own format",
    ),
    ShapeCase(
        name="another kind",
        document={"kind": "Pod", "metadata": {"name": "x"}},
        expect="kind: 'Pod' is not one of FineTuneJob, GenerateJob",
    ),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_shape(case: ShapeCase) -> None:
    with pytest.raises(InvalidJob) as refused:
        check_job(case.document)
    assert case.expect in refused.value.problems


@pytest.mark.parametrize("case", STRANGE, ids=lambda case: case.name)
def test_a_strange_manifest_is_judged_as_by_the_api_server(case: StrangeCase) -> None:
    if case.message is None:
        check_job(case.document)
        return
    with pytest.raises(InvalidJob) as refused:
        check_job(case.document)
    assert refused.value.problems == [case.message]


def test_no_value_means_the_default() -> None:
    assert check_job(specified(training=None, workspace=None, hub=None, method={"rank": None})) == check_job(FINE_TUNE)


def test_no_value_stays_where_it_may_mean_something() -> None:
    parameters = {"pad_token_id": None, "rope_theta": 10000.0}
    job = check_job(
        specified(model={"config": {"modelType": "llama", "parameters": parameters}}, method={"type": "full"})
    )
    assert isinstance(job, FineTuneJob)
    assert job.spec.model.config
    assert job.spec.model.config.parameters == parameters


def test_all_problems_are_reported_at_once() -> None:
    document = tune(zebra=1, task="poetry", training={"epochs": 0})
    with pytest.raises(InvalidJob) as refused:
        check_job(document)
    assert len(refused.value.problems) == 3


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Path → value, of all that is no object."""
    if not isinstance(value, dict):
        return {path: value}
    return {
        at: leaf for name, below in value.items() for at, leaf in leaves(below, f"{path}.{name}".strip(".")).items()
    }


@pytest.mark.parametrize("document", [FINE_TUNE, GENERATE], ids=["FineTuneJob", "GenerateJob"])
def test_defaults_are_those_of_the_crd_and_of_the_tables(document: Document) -> None:
    """The API server fills in what the schema says; pydantic must fill in the same, and only the tables know more."""
    spec = parse_job(document).spec
    read, kept = leaves(spec.dump()), leaves(stored(document)["spec"])
    assert {path: read[path] for path in kept} == kept
    marked = [field.path for field in marked_fields(type(spec))]
    beyond = [path for path, value in read.items() if path not in kept and value != []]
    assert [path for path in beyond if not any(f"{path}.".startswith(f"{mark}.") for mark in marked)] == []
    assert parse_job(stored(document)) == parse_job(document)


def test_settings_that_depend_on_task_and_method() -> None:
    options = {"beta1": 0.8, "beta2": 0.999}
    given = tune(method={"type": "qlora", "rank": 4}, training={"optimizerOptions": options})
    assert settings_of(check_job(given).spec) == {
        "dataset.parseSpecialTokens": False,
        "model.resizeEmbeddings": False,
        "method.rank": 4,
        "method.alpha": 32,
        "method.dropout": 0.0,
        "method.targetModules": ["all-linear"],
        "method.rslora": False,
        "method.dora": False,
        "method.bias": "none",
        "training.maxLength": 1024,
        "training.attention": "auto",
        "training.torchCompile": False,
        "training.groupByLength": False,
        "dataset.streaming": False,
        "training.packing": "none",
        "training.optimizerOptions.beta1": 0.8,
        "training.saveSteps": 500,
    }
    assert settings_of(check_job(make()).spec) == {
        "inputs.form": "columns",
        "text.chat": False,
        "text.offload": "none",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("method", "expect"),
    [
        ({"type": "qlora"}, {"type": "nf4"}),
        ({"type": "lora"}, None),
        ({"type": "full"}, None),
    ],
)
def test_qlora_is_lora_on_nf4(method: dict[str, str], expect: dict[str, str] | None) -> None:
    job = check_job(tune(method=method))
    assert isinstance(job, FineTuneJob)
    assert job.spec.dump()["model"].get("quantization") == expect


def test_drawn_files_are_current() -> None:
    assert drawn.main(check=True) == 0


@pytest.mark.parametrize("kind", list(crd.KINDS))
def test_the_schema_is_structural(kind: str) -> None:
    """What the API server would refuse: unions, references, properties beside additionalProperties."""

    def walk(node: object, path: str) -> None:
        if isinstance(node, dict):
            assert not {"anyOf", "oneOf", "allOf", "$ref", "$defs"} & (node.keys() if "type" in node else set()), path
            if isinstance(node.get("properties"), dict):
                assert "additionalProperties" not in node, path
            for key, below in node.items():
                walk(below, f"{path}.{key}")
        elif isinstance(node, list):
            for below in node:
                walk(below, path)

    info = crd.KINDS[kind]  # type: ignore[index]
    walk(crd.crd(kind, info), str(kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(crd.KINDS))
def test_the_rules_of_all_objects_are_two_of_the_root(kind: JobKind) -> None:
    """A status write costs the API server as much as evaluating each rule that stands elsewhere."""
    root = crd.crd(kind, KINDS[kind])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    about_spec = [rule for rule in root if "self.spec" in rule["rule"]]
    assert [rule["rule"].startswith("self.?status.?writes != oldSelf.?status.?writes || ") for rule in about_spec] == [
        True,
        True,
    ]
    for path, node in schemas(kind):
        if node.get("type") == "object" and "[]" not in path and "properties" in node:
            assert "x-kubernetes-validations" not in node, path
    drawn_rules = list(rules_of_blocks(KINDS[kind].spec, "spec"))
    assert len(drawn_rules) > 20
    for rule in drawn_rules:
        assert json.dumps(f"{rule.message}. ", ensure_ascii=False) in "".join(
            r["messageExpression"] for r in about_spec
        )


LISTS = {
    "set": {
        "spec.method.targetModules",
        "spec.method.feedforwardModules",
        "spec.method.modulesToSave",
        "spec.method.freeze",
        "spec.inputs.columns.carry",
        "spec.image.metadata",
        "spec.image.safety.labels",
        "spec.text.stop",
        "spec.zeroShot.labels",
        "spec.inputs.rows[].overrides.text.stop",
        "spec.inputs.sweep.zip.text.stop[]",
        "spec.inputs.sweep.product.text.stop[]",
    },
    "map": {
        "spec.volumes",
        "spec.stores",
        "spec.tracking",
        "spec.scheduling.topologySpreadConstraints",
        "status.conditions",
    },
}


@pytest.mark.parametrize("part", ["spec", "status"])
@pytest.mark.parametrize("kind", crd.KINDS)
def test_every_node_of_the_schema_follows_the_conventions_of_kubernetes(kind: str, part: str) -> None:
    for path, node in schemas(kind, part):
        if node.get("type") == "array":
            expected = next((name for name, paths in LISTS.items() if path in paths), "atomic")
            assert node["x-kubernetes-list-type"] == expected, path
            assert ("x-kubernetes-list-map-keys" in node) == (expected == "map"), path
        if node.get("type") == "integer":
            assert node["format"] in ("int32", "int64"), path
            assert node["format"] == "int64" or node["maximum"] < 2**31, path
        if path.lower().endswith("time"):
            assert node["format"] == "date-time", path


def test_a_later_operator_may_write_conditions_that_this_schema_does_not_know() -> None:
    condition = dict(schemas("FineTuneJob", "status"))["status.conditions[]"]["properties"]
    assert [name for name in ("type", "reason") if "enum" in condition[name]] == []


@pytest.mark.parametrize("part", ["spec", "status"])
@pytest.mark.parametrize("kind", crd.KINDS)
def test_every_field_is_described(kind: str, part: str) -> None:
    """`kubectl explain` and the pages have nothing else to say."""
    fields = [(path, node) for path, node in schemas(kind, part) if not path.endswith(("[]", "{}"))]
    assert len(fields) > 50
    assert [path for path, node in fields if len(node.get("description", "")) < 10] == []


def test_exit_codes() -> None:
    assert {int(c) for c in ExitCode} == {0, 64, 65, 66, 69, 70, 71, 74, 75, 77, 78, 79, 80, 81, 82, 83, 84}
    assert len({c.reason for c in ExitCode}) == len(ExitCode)
    assert ExitCode.of(75) is ExitCode.PREEMPTED
    assert ExitCode.of(137) is None
    by_retry = {retry: ExitCode.codes(retry) for retry in Retry}
    assert by_retry[Retry.FREE] == [75]
    assert by_retry[Retry.NEVER] == [64, 65, 66, 77, 78, 79, 82, 83, 84, 126, 127]
    classified = [code for codes in by_retry.values() for code in codes]
    assert len(set(classified)) == len(classified)
    assert {int(code) for code in ExitCode if code} <= set(classified)


@dataclass(frozen=True)
class OutputsOfARowCase:
    name: str
    document: Document
    expect: int


OUTPUTS_OF_A_ROW = [
    OutputsOfARowCase(
        name="texts",
        document=make(text={"perPrompt": 2, "temperature": 1.0}),
        expect=2,
    ),
    OutputsOfARowCase(
        name="images",
        document=make(task="text-to-image", image={"perPrompt": 3}),
        expect=3,
    ),
    OutputsOfARowCase(
        name="what the job leaves open",
        document=make(),
        expect=1,
    ),
]


@pytest.mark.parametrize("case", OUTPUTS_OF_A_ROW, ids=lambda case: case.name)
def test_outputs_of_a_row_are_those_of_the_task(case: OutputsOfARowCase) -> None:
    job = check_job(case.document)
    assert isinstance(job, GenerateJob)
    assert job.spec.per_prompt == case.expect


@dataclass(frozen=True)
class MessageCase:
    name: str
    fields: dict[str, str]
    message_begins: str
    output_ends: str


MESSAGES = [
    MessageCase(
        name="short",
        fields={"message": "spec.x: no"},
        message_begins="spec.x: no",
        output_ends="",
    ),
    MessageCase(
        name="many lines",
        fields={"message": "spec.x: no", "last_lines": "line\n" * 4000 + "the end"},
        message_begins="spec.x: no",
        output_ends="the end",
    ),
    MessageCase(
        name="other letters",
        fields={"message": "nein", "last_lines": "ß€🎻" * 4000},
        message_begins="nein",
        output_ends="🎻",
    ),
    MessageCase(
        name="a file's name that is no UTF-8",
        fields={"message": "caf\udce9.bin"},
        message_begins="caf?.bin",
        output_ends="",
    ),
    MessageCase(
        name="control characters",
        fields={"message": "m", "last_lines": "\x00\x1b" * 4000 + "end"},
        message_begins="m",
        output_ends="end",
    ),
    MessageCase(
        name="a long message",
        fields={"message": "x" * 9000},
        message_begins="x" * 3000,
        output_ends="",
    ),
]


@pytest.mark.parametrize("case", MESSAGES, ids=lambda case: case.name)
def test_a_termination_message_fits_into_what_the_kubelet_keeps(case: MessageCase) -> None:
    encoded = TerminationMessage(phase="run", code=70, reason="TrainingError", **case.fields).encode()  # type: ignore[arg-type]
    assert len(encoded) <= LIMIT_BYTES
    read = TerminationMessage.read(encoded.decode())
    assert read is not None
    assert read.message.startswith(case.message_begins)
    assert read.last_lines.endswith(case.output_ends)
    assert len(encoded) > LIMIT_BYTES * 0.6 or sum(map(len, case.fields.values())) < LIMIT_BYTES * 0.6


@dataclass(frozen=True)
class NoticeCase:
    name: str
    notices: list[str]
    message: str
    expect: tuple[int, str | None]  # how many are kept, and the last one


NOTICES = [
    NoticeCase(
        name="none",
        notices=[],
        message="m",
        expect=(0, None),
    ),
    NoticeCase(
        name="a few",
        notices=["one", "two"],
        message="m",
        expect=(2, "two"),
    ),
    NoticeCase(
        name="more than fit",
        notices=[f"{i:02d} " + "x" * 297 for i in range(20)],
        message="m",
        expect=(14, "7 more notices are in the log"),
    ),
    NoticeCase(
        name="beside a long message",
        notices=["x" * 300] * 20,
        message="y" * 3500,
        expect=(2, "19 more notices are in the log"),
    ),
]


@pytest.mark.parametrize("case", NOTICES, ids=lambda case: case.name)
def test_notices_are_left_out_before_the_message_is_cut(case: NoticeCase) -> None:
    written = TerminationMessage(
        phase="prepare", code=0, reason="Completed", message=case.message, notices=case.notices, last_lines="z" * 5000
    ).encode()
    read = TerminationMessage.read(written.decode())
    assert read is not None
    assert len(written) <= LIMIT_BYTES
    assert (len(read.notices), read.notices[-1] if read.notices else None) == case.expect
    assert read.message == case.message


@pytest.mark.parametrize("text", [None, "", "Traceback (most recent call last)", "{}", '{"phase": "run"}'])
def test_what_is_no_termination_message(text: str | None) -> None:
    assert TerminationMessage.read(text) is None


TRAIN = """# HELP luthier_train_step Optimiser steps done
# TYPE luthier_train_step gauge
luthier_train_step 120.0
luthier_train_max_steps 400.0
luthier_train_loss 2.34567
luthier_train_tokens_per_second 5210.4
luthier_train_samples_per_second 40.71828
luthier_train_eta_seconds 55.6
luthier_train_gpu_hours 12.345678
luthier_train_plan_seconds_ratio 1.25
luthier_train_plan_memory_ratio 0.91
luthier_train_step_duration_seconds_bucket{le="0.1"} 3.0
luthier_checkpoint_last_step 100
"""


def test_progress_of_training() -> None:
    samples = read_samples(TRAIN)
    assert 'luthier_train_step_duration_seconds_bucket{le="0.1"}' not in samples
    progress = training_progress([{}, samples])
    assert progress is not None
    assert (progress.step, progress.max_steps, progress.percent) == (120, 400, 30)
    assert (progress.loss, progress.tokens_per_second, progress.rows_per_second, progress.eta_seconds) == (
        2.346,
        5210.0,
        40.72,
        56,
    )
    assert (progress.gpu_hours, progress.plan_seconds_ratio, progress.plan_memory_ratio) == (12.35, 1.25, 0.91)
    assert checkpoint_step(samples) == 100


def test_progress_of_generation_adds_the_shards_up() -> None:
    shard = {"luthier_generate_rows": 3.0, "luthier_generate_max_rows": 10.0, "luthier_generate_rows_per_second": 0.5}
    progress = generation_progress([shard, shard])
    assert progress is not None
    assert (progress.rows, progress.max_rows, progress.percent, progress.eta_seconds) == (6, 20, 30, 14)
    whole = generation_progress([shard, shard], outputs=60)
    assert whole is not None
    assert (whole.rows, whole.max_rows, whole.percent, whole.eta_seconds) == (
        6,
        60,
        10,
        54,
    ), "four shards have not begun"


@pytest.mark.parametrize("pods", [[], [{}], [{"luthier_train_step": 1.0}]])
def test_no_progress_yet(pods: list[dict[str, float]]) -> None:
    assert training_progress(pods) is None
    assert generation_progress(pods) is None


MAX, OUTPUTS = "luthier_train_max_steps 4\n", "luthier_generate_max_rows 4\n"


@dataclass(frozen=True)
class NotToldCase:
    name: str
    text: str
    expect: Document | None


NOT_TOLD = [
    NotToldCase(
        name="a loss that is no number",
        text=MAX + "luthier_train_loss NaN\n",
        expect={"step": 0, "maxSteps": 4, "percent": 0},
    ),
    NotToldCase(
        name="a loss without end",
        text=MAX + "luthier_train_loss +Inf\nluthier_train_learning_rate -Inf\n",
        expect={"step": 0, "maxSteps": 4, "percent": 0},
    ),
    NotToldCase(
        name="no end in sight",
        text=MAX + "luthier_train_eta_seconds +Inf\n",
        expect={"step": 0, "maxSteps": 4, "percent": 0},
    ),
    NotToldCase(
        name="a step that is no number",
        text=MAX + "luthier_train_step NaN\n",
        expect={"step": 0, "maxSteps": 4, "percent": 0},
    ),
    NotToldCase(
        name="a step beyond all counts",
        text=MAX + "luthier_train_step 1e300\n",
        expect={"step": 0, "maxSteps": 4, "percent": 0},
    ),
    NotToldCase(
        name="steps without end",
        text="luthier_train_max_steps +Inf\n",
        expect=None,
    ),
    NotToldCase(
        name="less than one step",
        text="luthier_train_max_steps 0.2\n",
        expect=None,
    ),
    NotToldCase(
        name="a pace that is next to nothing",
        text=OUTPUTS + "luthier_generate_rows_per_second 1e-320\n",
        expect={"rows": 0, "maxRows": 4, "failedRows": 0, "rowsPerSecond": 1e-320, "percent": 0},
    ),
    NotToldCase(
        name="outputs without end",
        text="luthier_generate_max_rows +Inf\n",
        expect=None,
    ),
]


@pytest.mark.parametrize("case", NOT_TOLD, ids=lambda case: case.name)
def test_what_json_cannot_say_is_not_told(case: NotToldCase) -> None:
    samples = [read_samples(case.text)]
    progress = training_progress(samples) or generation_progress(samples)
    assert (progress.dump() | {"time": None} if progress else None) == (
        case.expect | {"time": None} if case.expect else None
    )


def test_a_checkpoint_beyond_all_counts_is_none() -> None:
    assert [checkpoint_step(read_samples(f"luthier_checkpoint_last_step {n}\n")) for n in ("+Inf", "NaN", "7")] == [
        None,
        None,
        7,
    ]


def test_final_figures_are_finite_whoever_wrote_them() -> None:
    told = {"perplexity": float("inf"), "trainLoss": float("nan"), "evalLoss": 1.5}
    assert TerminationMessage(phase="run", code=0, reason="Completed", metrics=told).metrics == {"evalLoss": 1.5}
    as_python_writes_it = (
        '{"phase": "run", "code": 0, "reason": "Completed", "metrics": {"perplexity": Infinity, "trainLoss": NaN,'
        ' "evalLoss": 1.5}}'
    )
    read = TerminationMessage.read(as_python_writes_it)
    assert read is not None
    assert read.metrics == {"evalLoss": 1.5}


def test_metric_names() -> None:
    assert len({m.name for m in POD_METRICS}) == len(POD_METRICS)
    assert set(POD_METRICS) == {m for m in vars(metrics).values() if isinstance(m, metrics.Metric)}
    for metric in POD_METRICS:
        assert metric.name.startswith("luthier_")
        assert metric.name.endswith("_total") == (metric.type == "counter")


def test_a_status_without_anything_is_empty() -> None:
    assert JobStatus().dump() == {
        "state": "",
        "conditions": [],
        "images": {},
        "restarts": 0,
        "restartsCharged": 0,
        "notices": [],
        "attempts": [],
        "resumes": 0,
        "activeSeconds": 0,
    }
    assert not FineTuneJob.model_validate(tune()).status.finished
    assert not GenerateJob.model_validate(make()).status.finished
