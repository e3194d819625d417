"""The rules of the API as tables: for each rule, and each field with a format, what is refused and what passes.

Read by the unit tests, which evaluate the rules on this machine, and by the cluster tests, where the API server does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from luthier_api.base import ApiModel, Rule, model_in
from luthier_api.crd import crd
from luthier_api.kinds import KINDS
from luthier_api.marks import rules_of

Document = dict[str, Any]

FINE_TUNE: Document = {
    "apiVersion": "luthier.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "sound"},
    "spec": {"task": "causal-lm", "model": {"id": "org/model"}, "dataset": {"files": ["/data/train.txt"]}},
}
GENERATE: Document = {
    "apiVersion": "luthier.dev/v1alpha1",
    "kind": "GenerateJob",
    "metadata": {"name": "sound"},
    "spec": {"task": "text-generation", "model": {"id": "org/model"}, "inputs": {"rows": [{"prompt": "a lute"}]}},
}

Change = dict[str, Any]
"""Path → value; None removes the field."""


@dataclass(frozen=True)
class Case:
    """`message` begins the message of the rule. For a rule on updates, `before` is the object that exists."""

    message: str
    refused: Change
    accepted: Change
    base: Document = field(default_factory=lambda: FINE_TUNE)


def changed(base: Document, change: Change) -> Document:
    """`base` with the fields of `change` set."""
    document = copy.deepcopy(base)
    for path, value in change.items():
        *parents, last = path.split(".")
        node = document
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(value)
    return document


def all_rules() -> Iterator[Rule]:
    """Every rule of both kinds, once."""
    seen: set[Rule] = set()
    for info in KINDS.values():
        for model in _models(info.model):
            for rule in rules_of(model):
                if rule not in seen:
                    seen.add(rule)
                    yield rule


def schemas(kind: str, part: str = "spec") -> Iterator[tuple[str, Document]]:
    """Path and schema of each field of `part` as the CRD has them; `[]` stands for an item of a list, `{}` for a value
    of a map.
    """

    def walk(path: str, node: Document) -> Iterator[tuple[str, Document]]:
        yield path, node
        for name, below in node.get("properties", {}).items():
            yield from walk(f"{path}.{name}", below)
        for mark, word in (("[]", "items"), ("{}", "additionalProperties")):
            if isinstance(node.get(word), dict):
                yield from walk(f"{path}{mark}", node[word])

    (drawn,) = [crd(k, info) for k, info in KINDS.items() if k == kind]
    return walk(part, drawn["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part])


def stored(document: Document) -> Document:
    """`document` as the API server keeps it: with the defaults that stand in the CRD."""

    def fill(value: Any, schema: Document) -> Any:
        if isinstance(value, dict) and "properties" in schema:
            defaults = {name: below["default"] for name, below in schema["properties"].items() if "default" in below}
            whole = copy.deepcopy(defaults) | value
            return {name: fill(below, schema["properties"].get(name, {})) for name, below in whole.items()}
        if isinstance(value, list) and "items" in schema:
            return [fill(item, schema["items"]) for item in value]
        return value

    _, schema = next(schemas(document["kind"]))
    return document | {"spec": fill(document["spec"], schema)}


@cache
def words() -> dict[str, str]:
    """Path of each field with a format → what its message says, over both kinds."""
    return {
        path: rule["message"]
        for kind in KINDS
        for path, node in schemas(kind)
        for rule in node.get("x-kubernetes-validations", [])
        if node.get("type", "string") == "string" or "additionalProperties" in node
    }


def _models(model: type[ApiModel]) -> Iterator[type[ApiModel]]:
    yield model
    for info in model.model_fields.values():
        below = model_in(info.annotation)
        if below is not None:
            yield from _models(below)


def mounted(*paths: str) -> Change:
    return {"spec.volumes": [{"claimName": "a", "mountPath": path} for path in paths]}


SECRET = {"name": "hf", "key": "token"}
NEGATIVE = [{"prompt": "a lute"}, {"prompt": "a harp", "negativePrompt": "strings"}]
FULL, LORA, QLORA = ({"spec.method": {"type": method}} for method in ("full", "lora", "qlora"))
CAUSAL, TEXTS, IMAGES = ({"spec.task": task} for task in ("causal-lm", "text-classification", "image-classification"))
PICTURES = {"spec.task": "text-to-image"}


def quantised(type: str) -> Change:
    return {"spec.model.quantization": {"type": type}}


# What is drawn from the tables of tasks, methods and quantisations: the fields that belong to some rows only ...
MARKS: list[Case] = [
    *(
        Case(f"spec.method.{field}: applies to lora, qlora;", FULL | change, method | change)
        for method in (LORA, QLORA)
        for field, change in {
            "rank": {"spec.method.rank": 4},
            "alpha": {"spec.method.alpha": 4},
            "dropout": {"spec.method.dropout": 0.1},
            "targetModules": {"spec.method.targetModules": ["q_proj"]},
        }.items()
    ),
    *(
        Case(f"spec.{field}: applies to causal-lm, text-classification;", IMAGES | change, task | change)
        for task in (CAUSAL, TEXTS)
        for field, change in {
            "training.maxLength": {"spec.training.maxLength": 64},
            "dataset.parseSpecialTokens": {"spec.dataset.parseSpecialTokens": True},
            "dataset.columns.text": {"spec.dataset.columns": {"text": "body"}},
            "model.quantization": quantised("int8"),
            "model.resizeEmbeddings": FULL | {"spec.model.resizeEmbeddings": True},
        }.items()
    ),
    *(
        Case(f"spec.{field}: applies to text-classification, image-classification;", CAUSAL | change, task | change)
        for task in (TEXTS, IMAGES)
        for field, change in {
            "dataset.mergeLabels": {"spec.dataset.mergeLabels": True},
            "dataset.columns.label": {"spec.dataset.columns": {"label": "intent"}},
        }.items()
    ),
    *(
        Case("spec.dataset.columns.image: applies to image-classification;", task | change, IMAGES | change)
        for task in (CAUSAL, TEXTS)
        for change in [{"spec.dataset.columns": {"image": "photo"}}]
    ),
    *(
        Case(f"spec.{field}: applies to causal-lm;", task | change, CAUSAL | change)
        for task in (TEXTS, IMAGES)
        for field, change in {
            "training.packing": {"spec.training.packing": True},
            "model.config": FULL | {"spec.model": {"config": {"modelType": "llama"}}},
        }.items()
    ),
    *(
        Case("spec.training.packing: applies to causal-lm;", IMAGES | {"spec.training.packing": off}, IMAGES)
        for off in (True, False)
    ),
    Case(
        "spec.model.quantization: applies to lora, qlora;",
        FULL | quantised("nf4"),
        LORA | quantised("nf4"),
    ),
    *(
        Case(
            "spec.model.config: applies to full; new weights are trained whole",
            adapters | {"spec.model": {"config": {"modelType": "llama"}}},
            FULL | {"spec.model": {"config": {"modelType": "llama"}}},
        )
        for adapters in ({}, LORA, QLORA)
    ),
    *(
        Case(
            "spec.model.resizeEmbeddings: applies to full; an adapter would not hold the new rows",
            adapters | {"spec.model.resizeEmbeddings": True},
            FULL | {"spec.model.resizeEmbeddings": True},
        )
        for adapters in ({}, LORA)
    ),
    Case("spec.text: applies to text-generation;", PICTURES | {"spec.text": {}}, {"spec.text": {}}, GENERATE),
    Case("spec.image: applies to text-to-image;", {"spec.image": {}}, PICTURES | {"spec.image": {}}, GENERATE),
    Case(
        "spec.model.job: applies to text-generation; set model.id or model.path",
        PICTURES | {"spec.model": {"job": "tune"}},
        {"spec.model": {"job": "tune"}},
        GENERATE,
    ),
    Case(
        "spec.adapters.job: applies to text-generation; set id or path",
        PICTURES | {"spec.adapters": [{"id": "org/a"}, {"job": "tune"}]},
        PICTURES | {"spec.adapters": [{"id": "org/a"}, {"path": "/a"}]},
        GENERATE,
    ),
    Case(
        "spec.adapters.file: applies to text-to-image;",
        {"spec.adapters": [{"path": "/a", "file": "a.safetensors"}]},
        PICTURES | {"spec.adapters": [{"path": "/a", "file": "a.safetensors"}]},
        GENERATE,
    ),
    Case(
        "spec.inputs.rows.negativePrompt: applies to text-to-image;",
        {"spec.inputs.rows": NEGATIVE},
        PICTURES | {"spec.inputs.rows": NEGATIVE},
        GENERATE,
    ),
    Case(
        "spec.inputs.columns.negativePrompt: applies to text-to-image;",
        {"spec.inputs": {"dataset": {"files": ["/p.csv"]}, "columns": {"negativePrompt": "no"}}},
        PICTURES | {"spec.inputs": {"dataset": {"files": ["/p.csv"]}, "columns": {"negativePrompt": "no"}}},
        GENERATE,
    ),
    *(
        Case(f"spec.model.{field}: does not apply to a GenerateJob; remove it", change, {}, GENERATE)
        for field, change in {
            "resizeEmbeddings": {"spec.model.resizeEmbeddings": True},
            "config": {"spec.model": {"config": {"modelType": "llama"}}},
            "quantization": quantised("int8"),
        }.items()
    ),
]
# ... and the values that suit some rows only.
CHOICES: list[Case] = [
    *(
        Case(
            "spec.method.type: image-classification works with full, lora; choose one of these, or another task",
            IMAGES | QLORA,
            accepted,
        )
        for accepted in (IMAGES | LORA, IMAGES | FULL, TEXTS | QLORA, CAUSAL | QLORA)
    ),
    *(
        Case(
            f"spec.dataset.format: {task['spec.task']} works with {formats}; choose one of these, or another task",
            task | {"spec.dataset.format": refused},
            task | {"spec.dataset.format": accepted},
        )
        for task, formats, refused, accepted in [
            (IMAGES, "imagefolder, parquet", "csv", "imagefolder"),
            (IMAGES, "imagefolder, parquet", "text", "parquet"),
            (CAUSAL, "csv, json, jsonl, parquet, text", "imagefolder", "text"),
            (TEXTS, "csv, json, jsonl, parquet", "text", "jsonl"),
            (TEXTS, "csv, json, jsonl, parquet", "imagefolder", "csv"),
        ]
    ),
    *(
        Case(
            "spec.model.quantization.type: qlora works with nf4; choose that, or another method.type",
            QLORA | quantised(refused),
            accepted,
        )
        for refused, accepted in [("int8", QLORA | quantised("nf4")), ("fp4", LORA | quantised("fp4"))]
    ),
    *(
        Case(
            f"spec.strategy: {name} works with auto, ddp, zero2, zero2-offload; choose one of these",
            change | {"spec.strategy": refused},
            change | {"spec.strategy": accepted},
        )
        for refused, accepted in [("zero3", "zero2"), ("zero3-offload", "zero2-offload")]
        for name, change in {
            "qlora": QLORA,
            "nf4": LORA | quantised("nf4"),
            "fp4": LORA | quantised("fp4"),
            "int8": LORA | quantised("int8"),
        }.items()
    ),
]
CASES: list[Case] = [
    *MARKS,
    *CHOICES,
    # names
    Case("metadata.name: at most 40 characters", {"metadata.name": "a" * 41}, {"metadata.name": "a" * 40}),
    Case("metadata.name: lower-case letters", {"metadata.name": "a.b"}, {"metadata.name": "a-b"}),
    Case(
        "metadata.name: at most 39",
        {"metadata.name": "a" * 40, "spec.resources.nodes": 11, "spec.training.batchSize": 11},
        {"metadata.name": "a" * 39, "spec.resources.nodes": 11, "spec.training.batchSize": 11},
    ),
    Case(
        "metadata.name: at most 39",
        {"metadata.name": "a" * 39, "spec.resources.nodes": 101, "spec.training.batchSize": 101},
        {"metadata.name": "a" * 40, "spec.resources.nodes": 10, "spec.training.batchSize": 10},
    ),
    # sources
    Case("model: set exactly one of", {"spec.model.path": "/models/m"}, {"spec.model": {"path": "/models/m"}}),
    Case("model.revision:", {"spec.model": {"path": "/m", "revision": "v1"}}, {"spec.model.revision": "v1"}),
    Case(
        "dataset: set exactly one of id and files",
        {"spec.dataset.id": "org/data"},
        {"spec.dataset": {"id": "org/data"}},
    ),
    Case("dataset.revision:", {"spec.dataset.revision": "v1"}, {"spec.dataset": {"id": "org/data", "revision": "v1"}}),
    Case("dataset.name:", {"spec.dataset.name": "en"}, {"spec.dataset": {"id": "org/data", "name": "en"}}),
    Case("dataset.format:", {"spec.dataset": {"id": "org/data", "format": "csv"}}, {"spec.dataset.format": "csv"}),
    *(
        Case("dataset.csv:", refused, accepted, base)
        for refused, accepted, base in [
            (
                {"spec.dataset": {"files": ["/x"], "format": "json", "csv": {}}},
                {"spec.dataset": {"files": ["/x"], "format": "csv", "csv": {"quoting": "none"}}},
                FINE_TUNE,
            ),
            (
                {"spec.dataset": {"files": ["/x"], "format": "text", "csv": {}}},
                {"spec.dataset": {"id": "org/data", "csv": {"separator": "semicolon"}}},
                FINE_TUNE,
            ),
            (
                {"spec.inputs": {"dataset": {"files": ["/x"], "format": "parquet", "csv": {}}}},
                {"spec.inputs": {"dataset": {"files": ["/x"], "csv": {}}}},
                GENERATE,
            ),
        ]
    ),
    *(
        Case("dataset.encoding:", {"spec.dataset": refused}, {"spec.dataset": accepted})
        for refused, accepted in [
            (
                {"files": ["/x"], "format": "imagefolder", "encoding": "cp1252"},
                {"id": "org/data", "encoding": "cp1252"},
            ),
            (
                {"files": ["/x"], "format": "parquet", "encoding": "cp1252"},
                {"files": ["/x"], "format": "text", "encoding": "utf-16-le"},
            ),
        ]
    ),
    Case(
        "dataset: set at most one of",
        {"spec.dataset.evalSplit": "test", "spec.dataset.evalFraction": 0.1},
        {"spec.dataset.evalFraction": 0.1},
    ),
    Case(
        "dataset.evalFiles:",
        {"spec.dataset": {"id": "org/data", "evalFiles": ["/e"]}},
        {"spec.dataset.evalFiles": ["/e"]},
    ),
    Case("dataset.split:", {"spec.dataset.split": "test"}, {"spec.dataset.split": "train[:10%]+train[20%:]"}),
    Case("dataset.split:", {"spec.dataset.split": "trainer"}, {"spec.dataset": {"id": "org/data", "split": "trainer"}}),
    Case(
        "dataset.split:",
        {"spec.inputs": {"dataset": {"files": ["/p.jsonl"], "split": "test"}}},
        {"spec.inputs": {"dataset": {"files": ["/p.jsonl"], "split": "train[:9]"}}},
        GENERATE,
    ),
    Case("dataset.evalSplit: files", {"spec.dataset.evalSplit": "test"}, {"spec.dataset.evalSplit": "train[90%:]"}),
    Case(
        "dataset.evalSplit: is what",
        {"spec.dataset.evalSplit": "train"},
        {"spec.dataset": {"id": "org/data", "evalSplit": "validation"}},
    ),
    Case("spec.model.job: is this job", {"spec.model": {"job": "sound"}}, {"spec.model": {"job": "another"}}),
    # where work lies
    Case(
        "workspace: size",
        {"spec.workspace": {"claimName": "mine", "size": "1Gi"}},
        {"spec.workspace": {"claimName": "mine"}},
    ),
    Case(
        "workspace.whenDeleted:",
        {"spec.workspace": {"claimName": "mine", "whenDeleted": "Delete"}},
        {"spec.workspace": {"whenDeleted": "Delete"}},
    ),
    Case(
        "volumes: set exactly one",
        {"spec.volumes": [{"claimName": "a", "configMap": "b", "mountPath": "/data"}]},
        {"spec.volumes": [{"configMap": "b", "mountPath": "/data"}]},
    ),
    *(
        Case("volumes.mountPath:", mounted(taken), mounted(free))
        for taken, free in [
            ("/workspace/x", "/workspaces"),
            ("/tmp", "/tmp2"),
            ("/lib", "/library"),
            ("/bin", "/bin.d"),
            ("/var/run", "/variants"),
            ("/root", "/roots"),
        ]
    ),
    Case(
        "spec.workspace.accessMode:",
        {"spec.workspace": {"accessMode": "ReadWriteOncePod"}, "spec.resources.nodes": 2},
        {"spec.workspace": {"accessMode": "ReadWriteOncePod"}},
    ),
    Case(
        "spec.workspace.accessMode:",
        {"spec.workspace": {"accessMode": "ReadWriteOncePod"}, "spec.shards": 2},
        {"spec.workspace": {"accessMode": "ReadWriteMany"}, "spec.shards": 2},
        GENERATE,
    ),
    Case(
        "tolerations.value:",
        {"spec.scheduling.tolerations": [{"key": "gpu", "operator": "Exists", "value": "yes"}]},
        {"spec.scheduling.tolerations": [{"key": "gpu", "operator": "Exists"}, {"key": "gpu", "value": "yes"}]},
    ),
    # the Hub
    Case(
        "hub.tokenSecretRef:",
        {"spec.hub": {"repo": "org/out"}},
        {"spec.hub": {"repo": "org/out", "tokenSecretRef": SECRET}},
    ),
    Case("hub: set repo", {"spec.hub": {"private": True}}, {"spec.hub": {"tokenSecretRef": SECRET}}),
    # FineTuneJob
    Case(
        "resources.processesPerNode:",
        {"spec.resources": {"gpusPerNode": 1, "processesPerNode": 2}},
        {"spec.resources": {"gpusPerNode": 0, "processesPerNode": 2}},
    ),
    Case(
        "method.targetModules:",
        {"spec.method.targetModules": ["all-linear", "q_proj"]},
        {"spec.method.targetModules": ["q_proj", "v_proj"]},
    ),
    Case(
        "training.warmupSteps: schedule",
        {"spec.training": {"schedule": "constant", "warmupSteps": 10}},
        {"spec.training": {"schedule": "constant_with_warmup", "warmupSteps": 10}},
    ),
    Case(
        "training.warmupSteps: training would end",
        {"spec.training": {"maxSteps": 10, "warmupSteps": 10}},
        {"spec.training": {"maxSteps": 10, "warmupSteps": 9}},
    ),
    *(
        Case(
            "spec.training.evalSteps:",
            {"spec.training.evalSteps": 10},
            {"spec.training.evalSteps": 10, f"spec.dataset.{held_out}": value},
        )
        for held_out, value in [
            ("evalSplit", "train[90%:]"),
            ("evalFiles", ["/data/eval.txt"]),
            ("evalFraction", 0.1),
        ]
    ),
    Case(
        "model.resizeEmbeddings: a model from",
        {"spec.model": {"config": {"modelType": "llama"}, "resizeEmbeddings": True}, "spec.method": {"type": "full"}},
        {"spec.model": {"config": {"modelType": "llama"}}, "spec.method": {"type": "full"}},
    ),
    Case(
        "spec.training.precision:",
        {"spec.resources": {"gpusPerNode": 0}, "spec.training": {"precision": "fp16"}},
        {"spec.training": {"precision": "fp16"}},
    ),
    Case(
        "spec.training.batchSize: must be a multiple of microBatchSize",
        {"spec.training": {"batchSize": 8, "microBatchSize": 3}},
        {"spec.training": {"batchSize": 9, "microBatchSize": 3}},
    ),
    Case(
        "spec.training.batchSize: must be a multiple of the number",
        {"spec.training": {"batchSize": 6}, "spec.resources": {"nodes": 2, "gpusPerNode": 2}},
        {"spec.training": {"batchSize": 8}, "spec.resources": {"nodes": 2, "gpusPerNode": 2}},
    ),
    # GenerateJob
    Case(
        "adapters: set exactly one",
        {"spec.adapters": [{"id": "org/a", "path": "/a"}]},
        {"spec.adapters": [{"job": "tune"}]},
        GENERATE,
    ),
    Case(
        "adapters.revision:",
        {"spec.adapters": [{"path": "/a", "revision": "v1"}]},
        {"spec.adapters": [{"id": "org/a", "revision": "v1"}]},
        GENERATE,
    ),
    Case(
        "inputs: set exactly one", {"spec.inputs": {}}, {"spec.inputs": {"dataset": {"files": ["/p.jsonl"]}}}, GENERATE
    ),
    Case(
        "text.perPrompt:",
        {"spec.text": {"perPrompt": 2}},
        {"spec.text": {"perPrompt": 2, "temperature": 0.7}},
        GENERATE,
    ),
    Case(
        "spec.precision:",
        {"spec.resources": {"gpus": 0}, "spec.precision": "fp16"},
        {"spec.precision": "fp16"},
        GENERATE,
    ),
    Case(
        "adapters.file:",
        {"spec.task": "text-to-image", "spec.adapters": [{"job": "tune", "file": "a.safetensors"}]},
        {"spec.task": "text-to-image", "spec.adapters": [{"id": "org/a", "file": "styles/a.safetensors"}]},
        GENERATE,
    ),
    Case(
        "inputs.columns: rows that stand",
        {"spec.inputs": {"rows": [{"prompt": "a"}], "columns": {}}},
        {"spec.inputs": {"dataset": {"files": ["/p.jsonl"]}, "columns": {"carry": ["id"]}}},
        GENERATE,
    ),
    Case(
        "text.topP:",
        {"spec.text": {"topP": 0.9}},
        {"spec.text": {"topP": 0.9, "temperature": 0.7}},
        GENERATE,
    ),
    Case(
        "text.topK:",
        {"spec.text": {"topK": 40}},
        {"spec.text": {"topK": 40, "temperature": 0.7}},
        GENERATE,
    ),
    Case(
        "spec.inputs.rows.negativePrompt: has no effect",
        {"spec.task": "text-to-image", "spec.inputs.rows": NEGATIVE, "spec.image": {"guidance": 1}},
        {"spec.task": "text-to-image", "spec.inputs.rows": NEGATIVE},
        GENERATE,
    ),
]


@dataclass(frozen=True)
class Written:
    """A field with a format (`schemas` has its path), how a manifest sets it, and texts."""

    field: str
    change: Callable[[str], Change]
    refused: tuple[str, ...]
    accepted: tuple[str, ...]
    base: Document = field(default_factory=lambda: FINE_TUNE)

    @property
    def begins(self) -> str:
        """What the path in a message begins with."""
        return self.field.replace("[]", "[0]").removesuffix("{}")


def volume(**fields: str) -> Change:
    return {"spec.volumes": [{"mountPath": "/data"} | fields]}


def toleration(**fields: str) -> Change:
    return {"spec.scheduling.tolerations": [{"key": "gpu"} | fields]}


BYTES = (
    ("0", "0.0Gi", "-1Gi", "100m", "0e3", "1e", "Gi", "1.2.3", "many"),
    ("1Gi", "0.5Ti", ".5G", "1e9", "+1Ei", "1000000000"),
)
CORES = (("0", "0m", "-1", "1Gi"), ("1", "0.5", "500m", "10", "1500000u"))
NAMES = (("Mine", "my_claim", "-a", "a-", "a..b", "a/b"), ("a", "my-claim", "v1.models"))
HUB_NAMES = (
    (
        "a/b/c",
        "a b",
        ".a/b",
        "a/b-",
        "https://hub/a",
        "me/a--b",
        "me--x/a",
        "a..b",
        "me/x.git",
        "a" * 97,
        "me/" + "a" * 97,
    ),
    ("gpt2", "Qwen/Qwen2.5-7B", "a/_b", "x.git/a", "a/b.-c", "a" * 96 + "/" + "b" * 96),
)
REFS = (
    (
        "",
        "a b",
        "-a",
        "/a",
        "a/",
        "a//b",
        "a..b",
        ".a",
        "a/.b",
        "a.lock",
        "a.lock/b",
        "a.",
        "a~1",
        "a^",
        "a:b",
        "a@{1}",
        "@",
    ),
    ("main", "v1.0", "refs/pr/3", "team/v2-b_c", "1f0a8e3", "a.locks", "a@b"),
)
ENCODINGS = (("", "-8", "utf 8", "utf-8;"), ("cp1252", "utf-16-le", "utf_8"))
WRITTEN: list[Written] = [
    # field, how to set it, what is refused, what passes
    Written("spec.model.id", lambda t: {"spec.model.id": t}, *HUB_NAMES),
    Written("spec.model.job", lambda t: {"spec.model": {"job": t}}, ("Base", "a.b", "a-"), ("base", "b-2")),
    Written(
        "spec.model.config.modelType",
        lambda t: {"spec.model": {"config": {"modelType": t}}, "spec.method.type": "full"},
        ("", "Llama"),
        ("llama", "qwen3_moe"),
    ),
    Written("spec.dataset.id", lambda t: {"spec.dataset": {"id": t}}, *HUB_NAMES),
    Written("spec.dataset.encoding", lambda t: {"spec.dataset": {"files": ["/x"], "encoding": t}}, *ENCODINGS),
    Written(
        "spec.inputs.dataset.encoding",
        lambda t: {"spec.inputs": {"dataset": {"files": ["/x"], "encoding": t}}},
        *ENCODINGS,
        GENERATE,
    ),
    Written("spec.inputs.dataset.id", lambda t: {"spec.inputs": {"dataset": {"id": t}}}, *HUB_NAMES, GENERATE),
    Written("spec.adapters[].id", lambda t: {"spec.adapters": [{"id": t}]}, *HUB_NAMES, GENERATE),
    Written(
        "spec.adapters[].job",
        lambda t: {"spec.adapters": [{"job": t}]},
        ("Base", "a.b", "a-"),
        ("base", "b-2"),
        GENERATE,
    ),
    Written(
        "spec.adapters[].file",
        lambda t: {"spec.task": "text-to-image", "spec.adapters": [{"id": "org/a", "file": t}]},
        ("", "a.bin", ".safetensors/a", "/a.safetensors", "../a.safetensors", "a/./b.safetensors", "a//b.safetensors"),
        ("a.safetensors", "styles/Pixel Art.safetensors", "a..b.safetensors"),
        GENERATE,
    ),
    Written("spec.model.revision", lambda t: {"spec.model.revision": t}, *REFS),
    Written("spec.dataset.revision", lambda t: {"spec.dataset": {"id": "org/data", "revision": t}}, *REFS),
    Written(
        "spec.inputs.dataset.revision",
        lambda t: {"spec.inputs": {"dataset": {"id": "org/data", "revision": t}}},
        *REFS,
        GENERATE,
    ),
    Written("spec.adapters[].revision", lambda t: {"spec.adapters": [{"id": "org/a", "revision": t}]}, *REFS, GENERATE),
    Written("spec.hub.branch", lambda t: {"spec.hub": {"branch": t, "tokenSecretRef": SECRET}}, *REFS),
    Written("spec.hub.repo", lambda t: {"spec.hub": {"repo": t, "tokenSecretRef": SECRET}}, *HUB_NAMES),
    Written("spec.hub.tokenSecretRef.name", lambda t: {"spec.hub": {"tokenSecretRef": {"name": t}}}, *NAMES),
    Written(
        "spec.hub.tokenSecretRef.key",
        lambda t: {"spec.hub": {"tokenSecretRef": {"name": "hf", "key": t}}},
        ("a/b", "a b", ".", "..", "..a"),
        ("HF_TOKEN", ".token", "a.b"),
    ),
    Written("spec.resources.cpu", lambda t: {"spec.resources.cpu": t}, *CORES),
    Written("spec.resources.memory", lambda t: {"spec.resources.memory": t}, *BYTES),
    Written("spec.resources.cpu", lambda t: {"spec.resources.cpu": t}, *CORES, GENERATE),
    Written("spec.resources.memory", lambda t: {"spec.resources.memory": t}, *BYTES, GENERATE),
    Written("spec.workspace.size", lambda t: {"spec.workspace.size": t}, *BYTES),
    Written("spec.workspace.claimName", lambda t: {"spec.workspace.claimName": t}, *NAMES),
    Written("spec.workspace.storageClassName", lambda t: {"spec.workspace.storageClassName": t}, *NAMES),
    Written("spec.volumes[].claimName", lambda t: volume(claimName=t), *NAMES),
    Written("spec.volumes[].configMap", lambda t: volume(configMap=t), *NAMES),
    Written(
        "spec.volumes[].mountPath",
        lambda t: volume(claimName="a", mountPath=t),
        ("data", "/", "//tmp", "/./tmp", "/data/../tmp", "/data/..", "/data/", "/a:b", "/ü"),
        ("/data", "/models/.cache", "/mnt/a..b", "/data/v1.2_3-4"),
    ),
    Written("spec.scheduling.queueName", lambda t: {"spec.scheduling.queueName": t}, *NAMES),
    Written("spec.scheduling.priorityClassName", lambda t: {"spec.scheduling.priorityClassName": t}, *NAMES),
    Written(
        "spec.scheduling.nodeSelector",
        lambda t: {"spec.scheduling.nodeSelector": {t: "x"}},
        ("", "a b", "-a", "a/b/c", "/a", "Example.com/gpu", "a" * 64),
        ("gpu", "example.com/GPU_type", "a" * 63),
    ),
    Written(
        "spec.scheduling.nodeSelector{}",
        lambda t: {"spec.scheduling.nodeSelector": {"gpu": t}},
        ("a b", "-a", "a/b"),
        ("", "h100", "A_100.80"),
    ),
    Written(
        "spec.scheduling.tolerations[].key", lambda t: toleration(key=t), ("", "a b", "/a"), ("gpu", "nvidia.com/gpu")
    ),
    Written("spec.scheduling.tolerations[].value", lambda t: toleration(value=t), ("a b", "a/b"), ("", "h100")),
]


def specified(**spec: Any) -> Document:
    """A FineTuneJob with these fields of its spec as they are, also those that say null."""
    return {**FINE_TUNE, "spec": FINE_TUNE["spec"] | spec}


# Where a reader that means well and the API server could disagree.
STRANGE: list[tuple[str, Document, str | None]] = [
    (
        "a name of Python's",
        specified(resources={"gpus_per_node": 0}),
        "spec.resources.gpus_per_node: unknown field. Did you mean 'gpusPerNode'?",
    ),
    (
        "a text for a number",
        specified(training={"batchSize": "16"}),
        "spec.training.batchSize: input should be a valid integer (it is '16')",
    ),
    (
        "a text for yes or no",
        specified(training={"packing": "yes"}),
        "spec.training.packing: input should be a valid boolean (it is 'yes')",
    ),
    (
        "yes for a number",
        specified(training={"epochs": True}),
        "spec.training.epochs: input should be a valid number (it is True)",
    ),
    (
        "a part of a number",
        specified(training={"maxLength": 64.5}),
        "spec.training.maxLength: input should be a valid integer (it is 64.5)",
    ),
    ("a whole number for a quantity", specified(resources={"cpu": 16, "memory": 64_000_000_000}), None),
    ("a whole number with a point for a quantity", specified(resources={"cpu": 16.0}), None),
    (
        "no quantity above zero",
        specified(resources={"cpu": 0}),
        "spec.resources.cpu: must be a number of cores above zero, such as 4, \"0.5\" or 500m (it is '0')",
    ),
    (
        "a fraction for a quantity",
        specified(resources={"cpu": 0.5}),
        'spec.resources.cpu: must be a number of cores above zero, such as 4, "0.5" or 500m (it is 0.5)',
    ),
    (
        "yes for a quantity",
        specified(resources={"cpu": True}),
        'spec.resources.cpu: must be a number of cores above zero, such as 4, "0.5" or 500m (it is True)',
    ),
    (
        "a number for a text",
        specified(dataset={"id": "org/data", "name": 16}),
        "spec.dataset.name: input should be a valid string (it is 16)",
    ),
    (
        "two volumes at one place",
        specified(volumes=[{"claimName": name, "mountPath": "/data"} for name in "ab"]),
        "spec.volumes: two items have the mountPath '/data'; each must be there once",
    ),
    ("a volume below another", changed(FINE_TUNE, mounted("/data", "/models", "/data/more")), None),
    (
        "a module twice",
        specified(method={"targetModules": ["q_proj", "v_proj", "q_proj"]}),
        "spec.method.targetModules: two items have the value 'q_proj'; each must be there once",
    ),
    ("null for what must be there", specified(model=None), "spec.model: required"),
    ("null for what does not exist", specified(zebra=None), "spec.zebra: unknown field"),
    (
        "null in a list",
        specified(method={"targetModules": [None]}),
        "spec.method.targetModules[0]: input should be a valid string (it is None)",
    ),
    ("null where there is a default", specified(training=None, workspace=None), None),
    ("null where there is none", specified(hub=None), None),
    ("null below a default", specified(training={"batchSize": None, "epochs": 2}), None),
    ("null for a label", specified(scheduling={"nodeSelector": {"gpu": None}}), None),
    ("a whole number with a point", specified(training={"maxLength": 64.0}), None),
    ("a whole number for a fraction", specified(training={"learningRate": 1}), None),
    ("a status", FINE_TUNE | {"status": {"state": "Running"}}, None),
]

EXISTING: dict[str, Document] = {
    base["kind"]: changed(
        base, {"metadata.name": "fixed", "spec.suspend": True, "spec.hub": {"tokenSecretRef": SECRET}}
    )
    for base in (FINE_TUNE, GENERATE)
}
"""A job of each kind that is there already; suspended, so that no operator begins with it."""

# What may change once a job exists, and what may not: field → another value than the one in EXISTING.
STEERING: Change = {
    "spec.suspend": False,
    "spec.activeDeadlineSeconds": 60,
    "spec.ttlSecondsAfterFinished": 60,
    "spec.planOnly": True,
    "spec.hub": {"repo": "org/out", "tokenSecretRef": SECRET},
}
LIVE: dict[str, Change] = {
    "FineTuneJob": STEERING | {"spec.restarts": {"max": 7}},
    "GenerateJob": STEERING | {"spec.retriesPerShard": 7},
}
FIXED: list[tuple[str, Document, Change]] = [
    ("task", FINE_TUNE, {"spec.task": "text-classification"}),
    ("model", FINE_TUNE, {"spec.model.revision": "v2"}),
    ("dataset", FINE_TUNE, {"spec.dataset.split": "test"}),
    ("method", FINE_TUNE, {"spec.method.rank": 4}),
    ("training", FINE_TUNE, {"spec.training.epochs": 7}),
    ("resources", FINE_TUNE, {"spec.resources.nodes": 2}),
    ("strategy", FINE_TUNE, {"spec.strategy": "zero2"}),
    ("workspace", FINE_TUNE, {"spec.workspace.claimName": "mine"}),
    ("volumes", FINE_TUNE, {"spec.volumes": [{"claimName": "a", "mountPath": "/data"}]}),
    ("scheduling", FINE_TUNE, {"spec.scheduling.queueName": "team-a"}),
    ("task", GENERATE, {"spec.task": "text-to-image"}),
    ("model", GENERATE, {"spec.model.revision": "v2"}),
    ("adapters", GENERATE, {"spec.adapters": [{"job": "tune"}]}),
    ("inputs", GENERATE, {"spec.inputs.rows": [{"prompt": "a harp"}]}),
    ("text", GENERATE, {"spec.text.maxNewTokens": 3}),
    ("image", GENERATE, {"spec.image.steps": 3}),
    ("precision", GENERATE, {"spec.precision": "bf16"}),
    ("batchSize", GENERATE, {"spec.batchSize": 9}),
    ("seed", GENERATE, {"spec.seed": 9}),
    ("shards", GENERATE, {"spec.shards": 9}),
    ("resources", GENERATE, {"spec.resources.gpus": 0}),
    ("workspace", GENERATE, {"spec.workspace.claimName": "mine"}),
    ("volumes", GENERATE, {"spec.volumes": [{"claimName": "a", "mountPath": "/data"}]}),
    ("scheduling", GENERATE, {"spec.scheduling.queueName": "team-a"}),
]
