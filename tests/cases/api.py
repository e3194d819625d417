"""The rules of the API as tables: for each rule, and each field with a format, what is refused and what passes.

Read by the unit tests, which evaluate the rules on this machine, and by the cluster tests, where the API server does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from luthier_api.base import ApiModel, Rule
from luthier_api.crd import crd
from luthier_api.kinds import KINDS

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
            node[last] = value
    return document


def all_rules() -> Iterator[Rule]:
    """Every rule of both kinds, once."""
    seen: set[Rule] = set()
    for info in KINDS.values():
        for model in _models(info.model):
            for rule in model.rules:
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
    from luthier_api.base import model_in

    yield model
    for info in model.model_fields.values():
        below = model_in(info.annotation)
        if below is not None and issubclass(below, ApiModel):
            yield from _models(below)


def mounted(*paths: str) -> Change:
    return {"spec.volumes": [{"claimName": "a", "mountPath": path} for path in paths]}


SECRET = {"name": "hf", "key": "token"}
CASES: list[Case] = [
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
        "spec.method.type: new weights",
        {"spec.model": {"config": {"modelType": "llama"}}},
        {"spec.model": {"config": {"modelType": "llama"}}, "spec.method": {"type": "full"}},
    ),
    Case(
        "method.targetModules:",
        {"spec.method.targetModules": ["all-linear", "q_proj"]},
        {"spec.method.targetModules": ["q_proj", "v_proj"]},
    ),
    Case(
        "spec.strategy: ZeRO-3",
        {"spec.method": {"type": "qlora"}, "spec.strategy": "zero3"},
        {"spec.method": {"type": "qlora"}, "spec.strategy": "zero2"},
    ),
    Case(
        "spec.dataset.parseSpecialTokens:",
        {"spec.task": "image-classification", "spec.dataset.parseSpecialTokens": True},
        {"spec.task": "text-classification", "spec.dataset.parseSpecialTokens": True},
    ),
    Case(
        "spec.training.packing:",
        {"spec.task": "text-classification", "spec.training": {"packing": True}},
        {"spec.training": {"packing": True}},
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
        "spec.model.resizeEmbeddings: an adapter",
        {"spec.model": {"path": "/m", "resizeEmbeddings": True}, "spec.method": {"type": "lora"}},
        {"spec.model": {"path": "/m", "resizeEmbeddings": True}, "spec.method": {"type": "full"}},
    ),
    Case(
        "spec.model.resizeEmbeddings: the rows of this task",
        {
            "spec.task": "image-classification",
            "spec.model": {"path": "/m", "resizeEmbeddings": True},
            "spec.method": {"type": "full"},
        },
        {
            "spec.task": "text-classification",
            "spec.model": {"path": "/m", "resizeEmbeddings": True},
            "spec.method": {"type": "full"},
        },
    ),
    *(
        Case(
            "spec.model.config: only causal-lm",
            {"spec.task": task, "spec.model": {"config": {"modelType": "bert"}}, "spec.method": {"type": "full"}},
            {"spec.task": task, "spec.model": {"path": "/m"}, "spec.method": {"type": "full"}},
        )
        for task in ("text-classification", "image-classification")
    ),
    *(
        Case(
            "spec.method.type: qlora quantises linear layers",
            {"spec.task": "image-classification", "spec.method": {"type": "qlora"}},
            accepted,
        )
        for accepted in [
            {"spec.task": "image-classification", "spec.method": {"type": "lora"}},
            {"spec.task": "image-classification", "spec.method": {"type": "full"}},
            {"spec.task": "text-classification", "spec.method": {"type": "qlora"}},
            {"spec.task": "causal-lm", "spec.method": {"type": "qlora"}},
        ]
    ),
    *(
        Case(
            "spec.dataset.mergeLabels:",
            {"spec.dataset.mergeLabels": True},
            {"spec.task": task, "spec.dataset.mergeLabels": True},
        )
        for task in ("text-classification", "image-classification")
    ),
    *(
        Case(
            "spec.dataset.format: images come",
            {"spec.task": "image-classification", "spec.dataset.format": refused},
            {"spec.task": task, "spec.dataset.format": accepted},
        )
        for refused, task, accepted in [
            ("csv", "image-classification", "imagefolder"),
            ("text", "image-classification", "parquet"),
            ("jsonl", "causal-lm", "jsonl"),
        ]
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
        "spec.model.resizeEmbeddings: new rows",
        {"spec.model": {"path": "/m", "resizeEmbeddings": True}},
        {"spec.model": {"path": "/m"}},
        GENERATE,
    ),
    Case(
        "spec.model.config: new weights cannot",
        {"spec.model": {"config": {"modelType": "llama"}}},
        {"spec.model": {"path": "/m"}},
        GENERATE,
    ),
    Case(
        "spec.precision:",
        {"spec.resources": {"gpus": 0}, "spec.precision": "fp16"},
        {"spec.precision": "fp16"},
        GENERATE,
    ),
    Case(
        "spec.model.job:",
        {"spec.task": "text-to-image", "spec.model": {"job": "tune"}},
        {"spec.model": {"job": "tune"}},
        GENERATE,
    ),
    Case(
        "spec.adapters.job:",
        {"spec.task": "text-to-image", "spec.adapters": [{"id": "org/a"}, {"job": "tune"}]},
        {"spec.task": "text-to-image", "spec.adapters": [{"id": "org/a"}, {"path": "/a"}]},
        GENERATE,
    ),
    Case(
        "adapters.file:",
        {"spec.task": "text-to-image", "spec.adapters": [{"job": "tune", "file": "a.safetensors"}]},
        {"spec.task": "text-to-image", "spec.adapters": [{"id": "org/a", "file": "styles/a.safetensors"}]},
        GENERATE,
    ),
    Case(
        "spec.adapters.file:",
        {"spec.adapters": [{"path": "/a", "file": "a.safetensors"}]},
        {"spec.task": "text-to-image", "spec.adapters": [{"path": "/a", "file": "a.safetensors"}]},
        GENERATE,
    ),
    Case(
        "inputs.columns.carry:",
        {"spec.inputs": {"rows": [{"prompt": "a"}], "columns": {"carry": ["id"]}}},
        {"spec.inputs": {"dataset": {"files": ["/p.jsonl"]}, "columns": {"carry": ["id"]}}},
        GENERATE,
    ),
    Case(
        "spec.inputs.rows.negativePrompt:",
        {"spec.inputs.rows": [{"prompt": "a"}, {"prompt": "b", "negativePrompt": "c"}]},
        {"spec.task": "text-to-image", "spec.inputs.rows": [{"prompt": "b", "negativePrompt": "c"}]},
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
