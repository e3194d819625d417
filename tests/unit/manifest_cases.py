"""Manifests by rule: what each CEL rule accepts and what it refuses.

The API server's tests apply the same table, so that a laptop and a cluster cannot judge differently.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]

TUNE: Document = {
    "apiVersion": "luthier.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tune"},
    "spec": {"task": "causal-lm", "model": {"id": "org/model"}, "dataset": {"id": "org/data"}, "resources": {"gpusPerNode": 1}},
}  # fmt: skip
GENERATE: Document = {
    "apiVersion": "luthier.dev/v1alpha1", "kind": "GenerateJob", "metadata": {"name": "make"},
    "spec": {"task": "text-generation", "model": {"id": "org/model"}, "inputs": {"rows": [{"prompt": "Hello"}]}},
}  # fmt: skip
REMOVED = object()


def given(base: Document, **changes: Any) -> Document:
    """`base` with fields changed: `spec__model__id=...`; REMOVED takes a field away."""
    document = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = document
        for part in parents:
            node = node.setdefault(part, {})
        if value is REMOVED:
            node.pop(last, None)
        else:
            node[last] = value
    return document


@dataclass(frozen=True)
class Case:
    """One rule."""

    name: str
    accepted: Document
    refused: Document
    message: str


def tune(**changes: Any) -> Document:
    return given(TUNE, **{f"spec__{k}" if not k.startswith("metadata") else k: v for k, v in changes.items()})


def make(**changes: Any) -> Document:
    return given(GENERATE, **{f"spec__{k}" if not k.startswith("metadata") else k: v for k, v in changes.items()})


NEW: Document = {"config": {"modelType": "llama"}}
CPU = {"resources": {"gpusPerNode": 0}}
TOKEN = {"name": "hf"}

CASES: list[Case] = [
    Case("a name of 40 characters", tune(metadata__name="a" * 40), tune(metadata__name="a" * 41), "metadata.name: at most 40 characters, so that the names of pods fit; choose a shorter one"),
    Case("a name in small letters", make(metadata__name="a-1"), make(metadata__name="A.1"), "metadata.name: lower-case letters, digits and '-' only, because pods are named after it"),
    Case("one source of the model", tune(model={"path": "/models/m"}), tune(model={"path": "/models/m", "id": "org/m"}), "model: set exactly one of id, path, job and config"),
    Case("no source of the model", make(model={"job": "tune"}), make(model={}), "model: set exactly one of id, path, job and config"),
    Case("revision of a Hub model", tune(model={"id": "org/m", "revision": "v1"}), tune(model={"path": "/m", "revision": "v1"}), "model.revision: only a model of the Hub has revisions; set model.id or remove it"),
    Case("one source of the data", tune(dataset={"files": ["/data/a.csv"]}), tune(dataset={"id": "org/d", "files": ["/data/a.csv"]}), "dataset: set exactly one of id and files"),
    Case("revision of Hub data", tune(dataset={"id": "org/d", "revision": "v1"}), tune(dataset={"files": ["/a"], "revision": "v1"}), "dataset.revision: only a dataset of the Hub has revisions; set dataset.id or remove it"),
    Case("configuration of Hub data", tune(dataset={"id": "org/d", "name": "en"}), tune(dataset={"files": ["/a"], "name": "en"}), "dataset.name: only a dataset of the Hub has configurations; set dataset.id or remove it"),
    Case("format of files", tune(dataset={"files": ["/a"], "format": "csv"}), tune(dataset={"id": "org/d", "format": "csv"}), "dataset.format: belongs to dataset.files; a Hub dataset knows its own format"),
    Case("format of inputs", make(inputs={"dataset": {"files": ["/a"], "format": "csv"}}), make(inputs={"dataset": {"id": "org/d", "format": "csv"}}), "dataset.format: belongs to dataset.files; a Hub dataset knows its own format"),
    Case("one way to hold out", tune(dataset={"id": "org/d", "evalSplit": "test"}), tune(dataset={"id": "org/d", "evalSplit": "test", "evalFraction": 0.1}), "dataset: set at most one of evalSplit, evalFiles and evalFraction"),
    Case("files to hold out", tune(dataset={"files": ["/a"], "evalFiles": ["/b"]}), tune(dataset={"id": "org/d", "evalFiles": ["/b"]}), "dataset.evalFiles: belongs to dataset.files; use evalSplit for a Hub dataset"),
    Case("a claim or a new one", tune(workspace={"claim": "mine"}), tune(workspace={"claim": "mine", "size": "1Gi"}), "workspace: size, storageClass and accessMode describe a new claim; remove them, or remove workspace.claim"),
    Case("deletion of our own claim", tune(workspace={"size": "1Gi", "whenDeleted": "Delete"}), make(workspace={"claim": "mine", "whenDeleted": "Delete"}), "workspace.whenDeleted: a claim that you brought is never deleted; remove whenDeleted, or let the operator create the claim"),
    Case("one volume a mount", tune(volumes=[{"claim": "c", "mountPath": "/data"}]), tune(volumes=[{"claim": "c", "configMap": "m", "mountPath": "/data"}]), "volumes: set exactly one of claim and configMap"),
    Case("a mount of one's own", make(volumes=[{"claim": "c", "mountPath": "/data"}]), make(volumes=[{"claim": "c", "mountPath": "/workspace/data"}]), "volumes.mountPath: that folder belongs to the pod; choose one such as /data or /models"),
    Case("a token to publish", tune(hub={"repo": "org/m", "tokenSecret": TOKEN}), tune(hub={"repo": "org/m"}), "hub.tokenSecret: publishing to hub.repo needs a token with write access"),
    Case("a hub that says something", tune(hub={"tokenSecret": TOKEN}), tune(hub={"private": True}), "hub: set repo (to publish), tokenSecret (to read private sources), or remove hub"),
    Case("processes on CPU", tune(resources={"gpusPerNode": 0, "processesPerNode": 2}), tune(resources={"gpusPerNode": 2, "processesPerNode": 2}), "resources.processesPerNode: a GPU job runs one process a GPU; remove it, or set gpusPerNode: 0 to train on CPU"),
    Case("new weights are trained whole", tune(model=NEW, method={"type": "full"}), tune(model=NEW, method={"type": "lora"}), "spec.method.type: new weights (spec.model.config) are trained whole; set method.type: full"),
    Case("4 bits and ZeRO", tune(method={"type": "qlora"}, strategy="zero2"), tune(method={"type": "qlora"}, strategy="zero3"), "spec.strategy: ZeRO-3 cannot shard a model quantised to 4 bits; use ddp or zero2 with method.type: qlora"),
    Case("packing", tune(training={"packing": True}), tune(task="text-classification", training={"packing": True}), "spec.training.packing: only causal-lm can join rows; remove packing for this task"),
    Case("classify from a pretrained model", tune(task="text-classification"), tune(task="text-classification", model=NEW, method={"type": "full"}), "spec.model.config: text-classification starts from a pretrained model; set model.id, path or job"),
    Case("fp16 trains on GPUs", tune(training={"precision": "fp16"}), tune(training={"precision": "fp16"}, resources={"gpusPerNode": 0}), "spec.training.precision: fp16 needs a GPU; use fp32 or bf16 on CPU"),
    Case("batch by micro-batch", tune(training={"batchSize": 8, "microBatchSize": 4}, resources={"gpusPerNode": 2}), tune(training={"batchSize": 8, "microBatchSize": 3}), "spec.training.batchSize: must be a multiple of microBatchSize times the number of processes"),
    Case("batch by processes", tune(training={"batchSize": 6}, resources={"nodes": 2, "gpusPerNode": 3}), tune(training={"batchSize": 8}, resources={"nodes": 3}), "spec.training.batchSize: must be a multiple of the number of processes (nodes times GPUs or processes a node)"),
    Case("no new weights to generate", make(model={"path": "/m"}), make(model=NEW), "spec.model.config: new weights cannot generate anything; set model.id, path or job"),
    Case("fp16 generates on GPUs", make(precision="fp16"), make(precision="fp16", resources={"gpus": 0}), "spec.precision: fp16 needs a GPU; use fp32 or bf16 on CPU"),
    Case("images from a pipeline", make(task="text-to-image", model={"id": "org/sdxl"}), make(task="text-to-image", model={"job": "tune"}), "spec.model.job: a FineTuneJob makes text models; set model.id or model.path for text-to-image"),
    Case("one source of an adapter", make(adapters=[{"job": "tune"}, {"id": "org/a"}]), make(adapters=[{"job": "tune", "id": "org/a"}]), "adapters: set exactly one of job, id and path"),
    Case("revision of a Hub adapter", make(adapters=[{"id": "org/a", "revision": "v1"}]), make(adapters=[{"path": "/a", "revision": "v1"}]), "adapters.revision: only an adapter of the Hub has revisions"),
    Case("one kind of inputs", make(inputs={"dataset": {"id": "org/d"}}), make(inputs={"rows": [{"prompt": "a"}], "dataset": {"id": "org/d"}}), "inputs: set exactly one of rows and dataset"),
    Case("several texts are drawn", make(text={"perPrompt": 2, "temperature": 0.7}), make(text={"perPrompt": 2}), "text.perPrompt: several texts for a row would be the same without a temperature; set text.temperature"),
]  # fmt: skip


@dataclass(frozen=True)
class Update:
    """One field that never changes."""

    field: str
    before: Document
    after: Document

    @property
    def message(self) -> str:
        return f"spec.{self.field} cannot change once the job exists; create another job for another {self.field}"


UPDATES: list[Update] = [
    Update("task", tune(), tune(task="text-classification")),
    Update("model", tune(), tune(model={"id": "org/other"})),
    Update("dataset", tune(), tune(dataset={"id": "org/other"})),
    Update("method", tune(), tune(method={"rank": 8})),
    Update("training", tune(), tune(training={"epochs": 2})),
    Update("resources", tune(), tune(resources={"nodes": 2})),
    Update("strategy", tune(), tune(strategy="zero2")),
    Update("workspace", tune(), tune(workspace={"size": "2Gi"})),
    Update("volumes", tune(), tune(volumes=[{"claim": "c", "mountPath": "/data"}])),
    Update("scheduling", tune(), tune(scheduling={"queue": "team"})),
    Update("task", make(), make(task="text-to-image")),
    Update("model", make(), make(model={"id": "org/other"})),
    Update("adapters", make(), make(adapters=[{"id": "org/a"}])),
    Update("inputs", make(), make(inputs={"rows": [{"prompt": "Bye"}]})),
    Update("text", make(), make(text={"maxNewTokens": 8})),
    Update("image", make(), make(image={"steps": 8})),
    Update("precision", make(), make(precision="fp32")),
    Update("batchSize", make(), make(batchSize=2)),
    Update("seed", make(), make(seed=2)),
    Update("shards", make(), make(shards=2)),
    Update("resources", make(), make(resources={"gpus": 0})),
    Update("workspace", make(), make(workspace={"size": "2Gi"})),
    Update("volumes", make(), make(volumes=[{"claim": "c", "mountPath": "/data"}])),
    Update("scheduling", make(), make(scheduling={"queue": "team"})),
]
"""Fields that may change are those of `luthier_api.spec.JobControl`, hub, restarts and retriesPerShard."""
