"""The manifests of the end-to-end tests, small enough for two cores."""

from __future__ import annotations

from typing import Any

from e2e.kube import Object

DATA = [{"claimName": "data", "mountPath": "/data"}]
WORK = {"claimName": "work"}
PROSE = {"files": ["/data/prose.txt"], "split": "train[:90%]", "evalSplit": "train[90%:]"}
REGISTER = {"files": ["/data/docstrings.txt"], "split": "train[:90%]", "evalSplit": "train[90%:]"}
CPU = {"gpusPerNode": 0, "cpu": "200m"}  # a request keeps pods from starving beside each other; one thread each
HUB = {"repo": "luthier/adapter", "tokenSecretRef": {"name": "hub-token", "key": "token"}}


def fine_tune(name: str, **spec: Any) -> Object:
    base = {"task": "causal-lm", "resources": CPU, "workspace": WORK, "volumes": DATA}
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": base | spec,
    }


def generate(name: str, **spec: Any) -> Object:
    base = {"task": "text-generation", "resources": {"gpus": 0, "cpu": "200m"}, "workspace": WORK, "volumes": DATA}
    return {
        "apiVersion": "luthier.dev/v1alpha1",
        "kind": "GenerateJob",
        "metadata": {"name": name},
        "spec": base | spec,
    }


def course(**values: Any) -> dict[str, Any]:
    """Training settings that any task has."""
    return {"maxSteps": 30, "batchSize": 8, "logSteps": 2, "saveSteps": 10, "learningRate": 0.002} | values


def training(**values: Any) -> dict[str, Any]:
    """Those of causal-lm, which packs its rows."""
    return course(maxLength=64, packing="concatenate", **values)


LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

BASE = fine_tune(
    "base",
    model={"config": {"modelType": "llama", "vocabSize": 2048, "parameters": LLAMA}},
    dataset=PROSE,
    method={"type": "full"},
    training=training(maxSteps=60),
    resources=CPU | {"processesPerNode": 2},
    strategy="zero2-offload",
)
ADAPTER = fine_tune(
    "adapter",
    model={"job": "base"},
    dataset=REGISTER,
    method={"type": "lora", "rank": 8},
    training=training(maxSteps=300),  # long enough to be watched
    resources=CPU | {"nodes": 2},
    hub=HUB,
)
QUANTISED = fine_tune(
    "quantised",
    model={"job": "base"},
    dataset=REGISTER,
    method={"type": "qlora", "rank": 8},
    training=training(maxSteps=20),
)
CLASSIFIER = fine_tune(
    "classifier",
    task="text-classification",
    model={"path": "/data/encoder"},
    dataset={"files": ["/data/packages.jsonl"], "evalFiles": ["/data/packages-test.jsonl"]},
    method={"type": "lora", "rank": 16},
    training=course(maxSteps=60, batchSize=16, learningRate=0.001, maxLength=96),
)
READER = fine_tune(
    "reader",
    task="image-classification",
    model={"path": "/data/vit"},
    dataset={"files": ["/data/digits"], "format": "imagefolder", "evalFraction": 0.2},
    method={"type": "full"},
    training=course(maxSteps=100, batchSize=32, learningRate=0.003),
    resources=CPU | {"nodes": 2},
)
TEXT = generate(
    "text",
    model={"job": "base"},
    adapters=[{"job": "adapter"}],
    inputs={"rows": [{"prompt": "Return the"}, {"prompt": "The class of"}, {"prompt": "A statement is"}]},
    text={"maxNewTokens": 16},
)
OWN = {"size": "1Gi"}
REGISTERED = fine_tune(
    "registered",
    model={"job": "base"},
    dataset=REGISTER,
    method={"type": "lora"},
    training=training(maxSteps=5),
    workspace=OWN,
)
MERGED = generate(
    "merged",
    model={"job": "registered"},
    inputs={"rows": [{"prompt": "Return the"}]},
    text={"maxNewTokens": 4},
    workspace=OWN,
)
IMAGES = generate(
    "images",
    task="text-to-image",
    model={"path": "/data/sdxl"},
    shards=2,
    batchSize=2,
    inputs={"rows": [{"prompt": f"a lute on a bench, study {i}", "seed": i} for i in range(60)]},
    image={"scheduler": "euler", "steps": 20, "width": 64, "height": 64, "guidance": 5.0},
)
