"""The rules of the API as a table: for each rule, a change to a sound manifest that it refuses and one that it lets pass.

Read by the unit tests, which evaluate the rules on this machine, and by the cluster tests, where the API server does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from luthier_api.base import ApiModel, Rule
from luthier_api.kinds import KINDS

Document = dict[str, Any]

FINE_TUNE: Document = {
    "apiVersion": "luthier.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "sound"},
    "spec": {"task": "causal-lm", "model": {"id": "org/model"}, "dataset": {"files": ["/data/train.txt"]}},
}  # fmt: skip
GENERATE: Document = {
    "apiVersion": "luthier.dev/v1alpha1", "kind": "GenerateJob", "metadata": {"name": "sound"},
    "spec": {"task": "text-generation", "model": {"id": "org/model"}, "inputs": {"rows": [{"prompt": "a lute"}]}},
}  # fmt: skip

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


def _models(model: type[ApiModel]) -> Iterator[type[ApiModel]]:
    from luthier_api.validation import _model_in

    yield model
    for info in model.model_fields.values():
        below = _model_in(info.annotation)
        if below is not None and issubclass(below, ApiModel):
            yield from _models(below)


SECRET = {"name": "hf", "key": "token"}
CASES: list[Case] = [
    # names
    Case("metadata.name: at most 40 characters", {"metadata.name": "a" * 41}, {"metadata.name": "a" * 40}),
    Case("metadata.name: lower-case letters", {"metadata.name": "a.b"}, {"metadata.name": "a-b"}),
    # sources
    Case("model: set exactly one of", {"spec.model.path": "/models/m"}, {"spec.model": {"path": "/models/m"}}),
    Case("model.revision:", {"spec.model": {"path": "/m", "revision": "v1"}}, {"spec.model.revision": "v1"}),
    Case("dataset: set exactly one of id and files", {"spec.dataset.id": "org/data"}, {"spec.dataset": {"id": "org/data"}}),
    Case("dataset.revision:", {"spec.dataset.revision": "v1"}, {"spec.dataset": {"id": "org/data", "revision": "v1"}}),
    Case("dataset.name:", {"spec.dataset.name": "en"}, {"spec.dataset": {"id": "org/data", "name": "en"}}),
    Case("dataset.format:", {"spec.dataset": {"id": "org/data", "format": "csv"}}, {"spec.dataset.format": "csv"}),
    Case("dataset: set at most one of", {"spec.dataset.evalSplit": "test", "spec.dataset.evalFraction": 0.1}, {"spec.dataset.evalFraction": 0.1}),
    Case("dataset.evalFiles:", {"spec.dataset": {"id": "org/data", "evalFiles": ["/e"]}}, {"spec.dataset.evalFiles": ["/e"]}),
    # where work lies
    Case("workspace: size", {"spec.workspace": {"claim": "mine", "size": "1Gi"}}, {"spec.workspace": {"claim": "mine"}}),
    Case("workspace.whenDeleted:", {"spec.workspace": {"claim": "mine", "whenDeleted": "Delete"}}, {"spec.workspace": {"whenDeleted": "Delete"}}),
    Case("volumes: set exactly one", {"spec.volumes": [{"claim": "a", "configMap": "b", "mountPath": "/data"}]},
         {"spec.volumes": [{"configMap": "b", "mountPath": "/data"}]}),
    Case("volumes.mountPath:", {"spec.volumes": [{"claim": "a", "mountPath": "/workspace/x"}]}, {"spec.volumes": [{"claim": "a", "mountPath": "/workspaces"}]}),
    # the Hub
    Case("hub.tokenSecret:", {"spec.hub": {"repo": "org/out"}}, {"spec.hub": {"repo": "org/out", "tokenSecret": SECRET}}),
    Case("hub: set repo", {"spec.hub": {"private": True}}, {"spec.hub": {"tokenSecret": SECRET}}),
    # FineTuneJob
    Case("resources.processesPerNode:", {"spec.resources": {"gpusPerNode": 1, "processesPerNode": 2}}, {"spec.resources": {"gpusPerNode": 0, "processesPerNode": 2}}),
    Case("spec.method.type: new weights", {"spec.model": {"config": {"modelType": "llama"}}},
         {"spec.model": {"config": {"modelType": "llama"}}, "spec.method": {"type": "full"}}),
    Case("spec.strategy: ZeRO-3", {"spec.method": {"type": "qlora"}, "spec.strategy": "zero3"}, {"spec.method": {"type": "qlora"}, "spec.strategy": "zero2"}),
    Case("spec.training.packing:", {"spec.task": "text-classification", "spec.training": {"packing": True}}, {"spec.training": {"packing": True}}),
    Case("spec.model.config: text-classification", {"spec.task": "text-classification", "spec.model": {"config": {"modelType": "bert"}}, "spec.method": {"type": "full"}},
         {"spec.task": "text-classification", "spec.model": {"path": "/m"}, "spec.method": {"type": "full"}}),
    Case("spec.training.precision:", {"spec.resources": {"gpusPerNode": 0}, "spec.training": {"precision": "fp16"}}, {"spec.training": {"precision": "fp16"}}),
    Case("spec.training.batchSize: must be a multiple of microBatchSize", {"spec.training": {"batchSize": 8, "microBatchSize": 3}},
         {"spec.training": {"batchSize": 9, "microBatchSize": 3}}),
    Case("spec.training.batchSize: must be a multiple of the number", {"spec.training": {"batchSize": 6}, "spec.resources": {"nodes": 2, "gpusPerNode": 2}},
         {"spec.training": {"batchSize": 8}, "spec.resources": {"nodes": 2, "gpusPerNode": 2}}),
    # GenerateJob
    Case("adapters: set exactly one", {"spec.adapters": [{"id": "org/a", "path": "/a"}]}, {"spec.adapters": [{"job": "tune"}]}, GENERATE),
    Case("adapters.revision:", {"spec.adapters": [{"path": "/a", "revision": "v1"}]}, {"spec.adapters": [{"id": "org/a", "revision": "v1"}]}, GENERATE),
    Case("inputs: set exactly one", {"spec.inputs": {}}, {"spec.inputs": {"dataset": {"files": ["/p.jsonl"]}}}, GENERATE),
    Case("text.perPrompt:", {"spec.text": {"perPrompt": 2}}, {"spec.text": {"perPrompt": 2, "temperature": 0.7}}, GENERATE),
    Case("spec.model.config: new weights cannot", {"spec.model": {"config": {"modelType": "llama"}}}, {"spec.model": {"path": "/m"}}, GENERATE),
    Case("spec.precision:", {"spec.resources": {"gpus": 0}, "spec.precision": "fp16"}, {"spec.precision": "fp16"}, GENERATE),
    Case("spec.model.job:", {"spec.task": "text-to-image", "spec.model": {"job": "tune"}}, {"spec.model": {"job": "tune"}}, GENERATE),
]  # fmt: skip

# What may change once a job exists, and what may not: field → (its first value, another).
LIVE: Change = {"spec.suspend": True, "spec.activeDeadlineSeconds": 60, "spec.ttlSecondsAfterFinished": 60, "spec.planOnly": True,
                "spec.hub": {"tokenSecret": SECRET}}  # fmt: skip
FIXED: list[tuple[str, Document, Change]] = [
    ("task", FINE_TUNE, {"spec.task": "text-classification"}),
    ("model", FINE_TUNE, {"spec.model.revision": "v2"}),
    ("dataset", FINE_TUNE, {"spec.dataset.split": "test"}),
    ("method", FINE_TUNE, {"spec.method.rank": 4}),
    ("training", FINE_TUNE, {"spec.training.epochs": 7}),
    ("resources", FINE_TUNE, {"spec.resources.nodes": 2}),
    ("strategy", FINE_TUNE, {"spec.strategy": "zero2"}),
    ("workspace", FINE_TUNE, {"spec.workspace.claim": "mine"}),
    ("volumes", FINE_TUNE, {"spec.volumes": [{"claim": "a", "mountPath": "/data"}]}),
    ("scheduling", FINE_TUNE, {"spec.scheduling.queue": "team-a"}),
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
    ("workspace", GENERATE, {"spec.workspace.claim": "mine"}),
    ("volumes", GENERATE, {"spec.volumes": [{"claim": "a", "mountPath": "/data"}]}),
    ("scheduling", GENERATE, {"spec.scheduling.queue": "team-a"}),
]
