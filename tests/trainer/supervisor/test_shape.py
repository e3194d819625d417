"""The shape of a run config, seen without its types: the same verdict as theirs on every value at every place, and in
which words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases.api import FINE_TUNE, GENERATE, WRITTEN, changed
from pydantic import ValidationError

from luthier_api import runschema
from luthier_api.run import RUNS, FineTuneRun, GenerateRun
from luthier_trainer.supervisor import shape

GOLDEN = Path(__file__).parents[2] / "unit/golden"
KINDS: dict[str, dict[str, Any]] = json.loads(runschema.render())["kinds"]


def run_of(job: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The run config of a manifest; keywords change it as those of `changed` do, with __ for the dots."""
    run = {"kind": job["kind"], "name": "job", "workspace": "/workspace/job", "spec": job["spec"]}
    return changed(run, {path.replace("__", "."): value for path, value in changes.items()})


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Run configs that the operator has written."""
    for file in sorted(GOLDEN.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if text := document.get("data", {}).get("run.json"):
                yield file.stem, json.loads(text)


def test_what_the_operator_writes_is_accepted() -> None:
    found = dict(configs())
    assert {run["kind"] for run in found.values()} == set(RUNS)
    assert {name: problems for name, run in found.items() if (problems := shape.problems(run))} == {}


def test_what_the_types_write_is_accepted(
    make_run: Callable[..., FineTuneRun], make_generate_run: Callable[..., GenerateRun]
) -> None:
    for run in (make_run(), make_generate_run()):
        assert shape.problems(json.loads(json.dumps(run.dump()))) == []
        # Null is no value, where the types say so
        assert shape.problems(run.model_dump(mode="json", by_alias=True)) == []


# Every value at every place


def sample(node: dict[str, Any], defs: dict[str, Any]) -> Any:
    """A value with all that pydantic's own schema lets it have."""
    if "anyOf" in node:
        node = node["anyOf"][0]
    if "$ref" in node:
        node = defs[node["$ref"].rsplit("/", 1)[1]]
    if "const" in node:
        return node["const"]
    if "enum" in node:
        return node["enum"][0]
    match node["type"]:
        case "object" if "properties" in node:
            return {name: sample(below, defs) for name, below in node["properties"].items()}
        case "object":
            below = node["additionalProperties"]
            return {"a": sample(below, defs) if isinstance(below, dict) else 1}
        case "array":
            return [sample(node["items"], defs)]
        case "string":
            form = node.get("x-luthier-format")
            return next(
                text for text in ("a", "1", "/a", "a.safetensors") if form is None or re.search(form.pattern, text)
            )
        case "integer":
            return max(node.get("minimum", 0), node.get("multipleOf", 1))
        case "number":
            return 0.5
    return True


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all that is in a document."""
    for key, below in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(below, (*path, key))


def bounds(node: Any) -> Iterator[float]:
    """Whatever number stands in pydantic's schema."""
    for key, below in node.items() if isinstance(node, dict) else ():
        if isinstance(below, int | float) and not isinstance(below, bool) and key != "default":
            yield below
        yield from bounds(below)
    for below in node if isinstance(node, list) else ():
        yield from bounds(below)


def words(node: Any) -> Iterator[str]:
    """Whatever may be chosen in pydantic's schema."""
    for key, below in node.items() if isinstance(node, dict) else ():
        if key in ("enum", "const"):
            yield from below if isinstance(below, list) else [below]
        else:
            yield from words(below)
    for below in node if isinstance(node, list) else ():
        yield from words(below)


def values(schema: dict[str, Any]) -> list[Any]:
    """To be tried at every place: of each type, on both sides of each bound, and the texts of the tables of the API."""
    near = sorted({b + d for b in bounds(schema) for d in (-1, -0.25, 0, 0.25, 1)})
    numbers = [int(n) if float(n).is_integer() else n for n in near]  # 64.0 is 64 in JSON, and told below
    lengths = [n for n in numbers if isinstance(n, int) and 0 <= n < 10_000]
    texts = (
        {t for w in WRITTEN for t in (*w.refused, *w.accepted)} | set(words(schema)) | {"", "no such", "é" * 40, "a\n"}
    )
    return [
        None,
        True,
        False,
        {},
        [],
        [None],
        ["a"],
        [1],
        {"a": None},
        {"a": 1},
        {"a": "a"},
        {"no such": "a"},
        {"a": "no such"},
        {"A" * 64: "a"},
        -(10**30),
        10**30,
        *numbers,
        *texts,
        *("a" * n for n in lengths),
        *(["a"] * n for n in lengths if n < 2000),
        *({f"a{i}": "a" for i in range(n)} for n in (32, 33)),
    ]


@pytest.mark.parametrize("kind", RUNS)
def test_every_value_at_every_place_is_judged_as_the_types_judge_it(kind: str) -> None:
    """The oracle is pydantic, strict and by outer names; nothing here is read from what is drawn, so that an error in
    the drawing shows.
    """
    model = RUNS[kind]
    schema = model.model_json_schema(by_alias=True)
    document = sample(schema, schema["$defs"])
    validator = shape.validator(KINDS[kind])

    def accepted() -> bool:
        try:
            model.model_validate(document, strict=True, by_alias=True, by_name=False)
        except ValidationError:
            return False
        return True

    assert accepted()
    assert shape.problems(document) == []
    tried, wrong, refused = values(schema), [], 0
    for path in list(places(document)):
        *way, last = path
        owner: Any = document
        for part in way:
            owner = owner[part]
        before = owner[last]
        for value in tried:
            owner[last] = value
            good = accepted()
            refused += not good
            if validator.is_valid(document) != good:
                wrong.append((path, repr(value)[:40], good))
        owner[last] = before
        if isinstance(owner, dict):
            del owner[last]
            if validator.is_valid(document) != accepted():
                wrong.append((path, "left out", accepted()))
            owner[last] = before
            owner["no such field"] = before
            if validator.is_valid(document) != accepted():
                wrong.append((path, "beside it", accepted()))
            del owner["no such field"]
    assert wrong == []
    assert refused > 1000


def test_every_keyword_has_words() -> None:
    """A keyword that nobody has thought of would be a crash in place of a line."""

    def walk(node: dict[str, Any]) -> None:
        for keyword in node.keys() - {
            "properties",
            "additionalProperties",
            "propertyNames",
            "items",
            "required",
            "words",
        }:
            assert shape.words(keyword, node)
        for below in [
            *node.get("properties", {}).values(),
            *(node[k] for k in ("additionalProperties", "propertyNames", "items") if k in node),
        ]:
            if isinstance(below, dict):
                walk(below)

    for schema in KINDS.values():
        walk(schema)


# Words

TUNE, MAKE = run_of(FINE_TUNE), run_of(GENERATE)
REPOSITORY = (
    "must be a repository of the Hub, OWNER/NAME, such as Qwen/Qwen3-8B: 96 characters each at most, without '--' and"
    " '..', and no .git at the end"
)
LINES: list[tuple[str, Any, list[str]]] = [
    ("a list", [], ["run config: must be an object (it is [])"]),
    ("nothing", {}, ["kind: required"]),
    ("another kind", {"kind": "Job"}, ["kind: must be 'FineTuneJob' or 'GenerateJob' (it is 'Job')"]),
    ("another version", TUNE | {"apiVersion": "v1"}, ["apiVersion: must be 'luthier.dev/run-v1' (it is 'v1')"]),
    (
        "an unknown field",
        run_of(FINE_TUNE, spec__dataset__splt="train"),
        ["spec.dataset.splt: unknown field. Did you mean 'split'?"],
    ),
    ("a field of no kind", run_of(FINE_TUNE, spec__xyzzy=1), ["spec.xyzzy: unknown field"]),
    (
        "a field by its inner name",
        run_of(FINE_TUNE, spec__dataset__eval_split="test"),
        ["spec.dataset.eval_split: unknown field. Did you mean 'evalSplit'?"],
    ),
    ("a field left out", run_of(FINE_TUNE, spec__model=None), ["spec.model: required"]),
    (
        "another word",
        run_of(FINE_TUNE, spec__method__type="loraa"),
        ["spec.method.type: must be 'full', 'lora' or 'qlora' (it is 'loraa')"],
    ),
    (
        "another word, or none",
        run_of(FINE_TUNE, spec__workspace__accessMode="RWO"),
        ["spec.workspace.accessMode: must be 'ReadWriteOnce', 'ReadWriteMany' or 'ReadWriteOncePod' (it is 'RWO')"],
    ),
    (
        "too small",
        run_of(FINE_TUNE, spec__training__maxSteps=0),
        ["spec.training.maxSteps: must be at least 1 (it is 0)"],
    ),
    ("too large", run_of(FINE_TUNE, spec__method__rank=1025), ["spec.method.rank: must be at most 1024 (it is 1025)"]),
    (
        "at the open end below",
        run_of(FINE_TUNE, spec__training__epochs=0),
        ["spec.training.epochs: must be greater than 0 (it is 0)"],
    ),
    (
        "at the open end above",
        run_of(FINE_TUNE, spec__method__dropout=1),
        ["spec.method.dropout: must be less than 1 (it is 1)"],
    ),
    (
        "no multiple",
        run_of(GENERATE, spec__image__width=1025),
        ["spec.image.width: must be a multiple of 8 (it is 1025)"],
    ),
    (
        "a part of a number",
        run_of(FINE_TUNE, spec__training__maxLength=64.5),
        ["spec.training.maxLength: must be a whole number (it is 64.5)"],
    ),
    (
        "a text for a number",
        run_of(FINE_TUNE, spec__training__epochs="1"),
        ["spec.training.epochs: must be a number (it is '1')"],
    ),
    (
        "yes for a number",
        run_of(FINE_TUNE, spec__training__maxLength=True),
        ["spec.training.maxLength: must be a whole number (it is True)"],
    ),
    (
        "a text for yes or no",
        run_of(FINE_TUNE, spec__suspend="no"),
        ["spec.suspend: must be true or false (it is 'no')"],
    ),
    ("a number for a text", run_of(FINE_TUNE, spec__model__id=7), ["spec.model.id: must be a text (it is 7)"]),
    ("a text for a list", run_of(FINE_TUNE, spec__volumes="a"), ["spec.volumes: must be a list (it is 'a')"]),
    ("a text for an object", run_of(FINE_TUNE, spec__hub="org/out"), ["spec.hub: must be an object (it is 'org/out')"]),
    ("null where there is a default", TUNE | {"name": None}, ["name: must be a text (it is None)"]),
    (
        "an empty list",
        run_of(FINE_TUNE, spec__dataset__files=[]),
        ["spec.dataset.files: must have 1 item or more (it is [])"],
    ),
    (
        "a long list",
        run_of(GENERATE, spec__adapters=[{"id": "a"}] * 9),
        [f"spec.adapters: must have 8 items at most (it is {str([{'id': 'a'}] * 9)[:100]}…)"],
    ),
    (
        "an empty text",
        run_of(FINE_TUNE, spec__dataset__split=""),
        ["spec.dataset.split: must have 1 character or more (it is '')"],
    ),
    (
        "a long text",
        run_of(FINE_TUNE, spec__dataset__split="a" * 254),
        [f"spec.dataset.split: must have 253 characters at most (it is '{'a' * 99}…)"],
    ),
    ("not so written", run_of(FINE_TUNE, spec__model__id="a b"), [f"spec.model.id: {REPOSITORY} (it is 'a b')"]),
    (
        "with what is never in it",
        run_of(FINE_TUNE, spec__model__id="a--b"),
        [f"spec.model.id: {REPOSITORY} (it is 'a--b')"],
    ),
    (
        "a key not so written",
        run_of(FINE_TUNE, spec__scheduling={"nodeSelector": {"a b": "c"}}),
        ["spec.scheduling.nodeSelector.a b: must be the key of a label, such as gpu or example.com/gpu (it is 'a b')"],
    ),
    (
        "in a list",
        run_of(GENERATE, spec__inputs__rows=[{"prompt": "a"}, {"prmpt": "b"}]),
        ["spec.inputs.rows[1].prmpt: unknown field. Did you mean 'prompt'?", "spec.inputs.rows[1].prompt: required"],
    ),
    (
        "infinite",
        run_of(FINE_TUNE, spec__training__maxGradNorm=float("inf")),
        ["spec.training.maxGradNorm: must be a finite number (it is inf)"],
    ),
    (
        "no number, where all is free",
        run_of(FINE_TUNE, spec__model={"config": {"modelType": "llama", "parameters": {"a": [float("nan")]}}}),
        ["spec.model.config.parameters.a[0]: must be a finite number (it is nan)"],
    ),
    (
        "half a character",
        run_of(GENERATE, spec__inputs__rows=[{"prompt": "\ud83d"}]),
        ["spec.inputs.rows[0].prompt: must be Unicode (it is '\\ud83d')"],
    ),
    (
        "a token at the cut",
        run_of(FINE_TUNE, spec__strategy="a" * 90 + "hf_" + "a1B2" * 9),
        [
            "spec.strategy: must be 'auto', 'ddp', 'zero2', 'zero2-offload', 'zero3' or 'zero3-offload' (it is '"
            + "a" * 90
            + "hf_…')",
        ],
    ),
    ("a whole one", run_of(GENERATE, spec__inputs__rows=[{"prompt": "\U0001f3b5 né"}]), []),
    ("a whole number with a point", run_of(FINE_TUNE, spec__training__maxLength=64.0), []),
    ("null where nothing else is", run_of(FINE_TUNE, spec__training={"maxSteps": None}), []),
    (
        "several",
        run_of(FINE_TUNE, spec__task="x", spec__training={"epochs": -1, "packing": 0}, spec__strategy="zero9"),
        [
            "spec.task: must be 'causal-lm'",
            "spec.training.epochs: must be greater than 0 (it is -1)",
            "spec.training.packing: must be true or false (it is 0)",
            "spec.strategy: must be 'auto'",
        ],
    ),
]


@pytest.mark.parametrize(("document", "lines"), [c[1:] for c in LINES], ids=[c[0] for c in LINES])
def test_words(document: Any, lines: list[str]) -> None:
    found = shape.problems(document)
    assert len(found) == len(lines), found
    for said, begins in zip(found, lines, strict=True):
        assert said.startswith(begins)
