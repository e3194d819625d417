"""The rules of the API as tables: for each rule, and each field with a format, what is refused and what passes.

Read by the unit tests, which evaluate the rules on this machine, and by the cluster tests, where the API server does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from luthier_api.base import ApiModel, Rule, model_in
from luthier_api.crd import crd
from luthier_api.kinds import KINDS
from luthier_api.marks import rules_of
from luthier_api.methods import METHODS
from luthier_api.tasks import GENERATION_TASKS, TRAINING_TASKS, UNPROVEN

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
    """Path and schema of each field of `part` as the CRD has them."""
    return fields_of(part, _drawn(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part])


def fields_of(path: str, node: Document) -> Iterator[tuple[str, Document]]:
    """Path and schema of a field and of all below it; `[]` stands for an item of a list, `{}` for a value of a map."""
    yield path, node
    for name, below in node.get("properties", {}).items():
        yield from fields_of(f"{path}.{name}", below)
    for mark, word in (("[]", "items"), ("{}", "additionalProperties")):
        if isinstance(node.get(word), dict):
            yield from fields_of(f"{path}{mark}", node[word])


@cache
def _drawn(kind: str) -> Document:
    """The CRD of a kind. Not to be changed."""
    (drawn,) = [crd(k, info) for k, info in KINDS.items() if k == kind]
    return drawn


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


def node_terms(**expression: Any) -> list[Any]:
    return [{"matchExpressions": [{"key": "gpu"} | expression]}]


NODES = "spec.scheduling.affinity.nodeAffinity"
REQUIRED, PREFERRED = (f"{word}DuringSchedulingIgnoredDuringExecution" for word in ("required", "preferred"))


def node_expression(**expression: Any) -> Change:
    return {f"{NODES}.{REQUIRED}": {"nodeSelectorTerms": node_terms(**expression)}}


def preferred_node(**expression: Any) -> Change:
    return {f"{NODES}.{PREFERRED}": [{"weight": 1, "preference": node_terms(**expression)[0]}]}


def pod_term(kind: str = "podAffinity", key: str = "zone", **selector: Any) -> Change:
    return {f"spec.scheduling.affinity.{kind}.{REQUIRED}": [{"topologyKey": key, "labelSelector": selector}]}


def preferred_pods(kind: str = "podAffinity", key: str = "zone", **selector: Any) -> Change:
    term = {"topologyKey": key, "labelSelector": selector}
    return {f"spec.scheduling.affinity.{kind}.{PREFERRED}": [{"weight": 1, "podAffinityTerm": term}]}


SECRET = {"name": "hf", "key": "token"}
PUBLISHED: dict[str, Any] = {"repo": "org/out", "tokenSecretRef": SECRET}
MLFLOW: dict[str, Any] = {"type": "mlflow", "url": "http://mlflow:5000"}
TRACKIO: dict[str, Any] = {
    "type": "trackio",
    "url": "http://trackio:7860",
    "secretRef": {"name": "trackio", "keys": {"writeToken": "token"}},
}


def kept(kind: str, *keys: str, name: str = "s") -> Change:
    """A store with credentials of a Secret."""
    return {"type": kind, "secretRef": {"name": name, "keys": dict.fromkeys(keys, "k")}}


CLASSIFY = {"spec.task": "text-classification", "spec.inputs.rows": [{"text": "a lute"}]}
SUMMARIES = CLASSIFY | {"spec.task": "summarization"}
ENTITIES = CLASSIFY | {"spec.task": "token-classification"}
ZERO_SHOT = CLASSIFY | {"spec.task": "zero-shot-classification", "spec.zeroShot": {"labels": ["a", "b"]}}
LOOK = {"spec.task": "image-classification", "spec.inputs.rows": [{"image": "/data/lute.png"}]}
HEAR = {"spec.task": "automatic-speech-recognition", "spec.inputs.rows": [{"audio": "/data/lute.wav"}]}
CHANGE = {
    "spec.task": "image-to-image",
    "spec.inputs.rows": [{"prompt": "a lute", "initImage": "/data/lute.png", "mask": "/data/mask.png"}],
}
QUESTION = {"question": "What is it?", "context": "a lute"}
ASKED = {"spec.task": "question-answering", "spec.inputs.rows": [QUESTION]}
OTHER = {"job": "other", "columns": {"prompt": "text"}}
BATCH = {"dataset": {"files": ["/requests.jsonl"]}, "form": "openai-batch"}
REFERENCES = {"dataset": {"files": ["/p.csv"]}, "columns": {"reference": "a"}}
NEEDED: dict[str, Change] = {"zero-shot-classification": {"spec.zeroShot": {"labels": ["a", "b"]}}}
"""What else a task must have."""
BLOCKS = {
    "classify": CLASSIFY,
    "entities": ENTITIES,
    "answers": ASKED,
    "zeroShot": ZERO_SHOT,
    "mask": CLASSIFY | {"spec.task": "fill-mask"},
    "embedding": CLASSIFY | {"spec.task": "feature-extraction"},
    "transcribe": HEAR,
}
"""Block of the spec → the manifest of its task."""


def named(role: str) -> Change:
    """Inputs from a file that name the column of a role."""
    return {"dataset": {"files": ["/p.csv"]}, "columns": {role: "a"}}


NEGATIVE = [{"prompt": "a lute"}, {"prompt": "a harp", "negativePrompt": "strings"}]
FULL, LORA, QLORA, BITFIT = ({"spec.method": {"type": method}} for method in ("full", "lora", "qlora", "bitfit"))
FSDP: dict[str, Any] = {"spec.strategy": "fsdp", "spec.resources": {"gpusPerNode": 2}}
ON_TWO_CPUS = {"spec.resources": {"gpusPerNode": 0, "processesPerNode": 2}}
ADALORA, IA3, PROMPT, PTUNING, PREFIX = (
    {"spec.method": {"type": name}} for name in ("adalora", "ia3", "prompt", "p-tuning", "prefix")
)


def methods_with(path: str) -> str:
    """The methods to which a field belongs, as messages list them."""
    return ", ".join(name for name, method in METHODS.items() if path in method.fields)


CAUSAL, TEXTS, IMAGES = ({"spec.task": task} for task in ("causal-lm", "text-classification", "image-classification"))
AUDIO, SPEECH = {"spec.task": "audio-classification"}, {"spec.task": "speech-recognition"}
PICTURES = {"spec.task": "text-to-image"}
PREFERENCE, REWARD = {"spec.task": "preference"}, {"spec.task": "reward"}
SEQ2SEQ, TAGS, QUESTIONS, MASKED, EMBEDDING = (
    {"spec.task": task} for task in ("seq2seq", "token-classification", "question-answering", "masked-lm", "embedding")
)
MATCHED = {"type": "exactMatch", "column": "answer"}
PYTHON: Change = {"type": "python", "file": "/code/rewards.py"}
TRACKED: Change = {"type": "mlflow", "url": "http://mlflow", "secretRef": {"name": "a", "keys": {"token": "t"}}}
GRPO: Change = {"spec.task": "grpo", "spec.grpo": {"rewards": [MATCHED]}}


SWEPT: list[tuple[str, str, str, Change]] = [
    ("text", "text-generation", "text-to-image", {"maxNewTokens": [5, 6]}),
    ("image", "text-to-image", "text-generation", {"steps": [5, 6]}),
]
"""A block of settings, a task that has it, one that has not, and values of a field."""


def swept(values: Change, *places: str) -> Change:
    """Inputs with a sweep of these values."""
    return {"rows": [{"prompt": "a lute"}], "sweep": dict.fromkeys(places, values)}


def overriding(block: str, values: Change) -> list[Change]:
    """Rows of which one overrides the first of these values."""
    first = {name: listed[0] for name, listed in values.items()}
    return [{"prompt": "a lute"}, {"prompt": "a harp", "overrides": {block: first}}]


def by_columns(field: str) -> Change:
    """Inputs with a column that overrides a field of the settings."""
    return {"dataset": {"files": ["/p.jsonl"]}, "columns": {"settings": {field: "n"}}}


def rewarded(*rewards: Change, **settings: Any) -> Change:
    """GRPO with these rewards."""
    return GRPO | {"spec.grpo": {"rewards": [*rewards], **settings}}


def fitting(path: str) -> str:
    """The tasks to which a field belongs, as messages name them."""
    return ", ".join(name for name, task in TRAINING_TASKS.items() if path in task.fields)


COSINES = ("cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr")
PEFT: dict[str, Change] = {
    "rslora": {"spec.method.rslora": True},
    "dora": {"spec.method.dora": True},
    "rankPattern": {"spec.method.rankPattern": {"q_proj": 4}},
    "alphaPattern": {"spec.method.alphaPattern": {"q_proj": 4}},
    "layers": {"spec.method.layers": [0, 1]},
    "initLoraWeights": {"spec.method.initLoraWeights": "gaussian"},
}
SAVED: Change = {"spec.method.modulesToSave": ["lm_head"]}
BIASED: Change = {"spec.method.bias": "lora_only"}
LOFTQ: Change = {"spec.method.initLoraWeights": "loftq"}
SMOOTHED: Change = {"spec.training.labelSmoothing": 0.1}
NOISY: Change = {"spec.training.neftuneNoiseAlpha": 5}
FASTER: Change = {"spec.training.optimizerOptions.loraplusLrRatio": 16}
HELD_OUT: Change = {"spec.dataset.evalFraction": 0.1}
HELD_OUT_FILES: Change = {"spec.dataset.evalFiles": ["/data/eval.jsonl"]}
FROM_FILES: Change = {"spec.dataset.files": ["/data/train.jsonl"]}
STREAM: Change = FROM_FILES | {"spec.dataset.streaming": True, "spec.training.maxSteps": 10}
MIX: dict[str, Any] = {"sources": [{"id": "org/a"}, {"id": "org/b"}]}
NEW_MODEL: Change = {"spec.model": {"config": {"modelType": "llama"}}, "spec.method.type": "full"}
COMPARED: Change = HELD_OUT | {"spec.training.evalSteps": 10, "spec.training.loadBestModel": True}
DECAY: Change = {"spec.training.schedule": "warmup_stable_decay", "spec.training.scheduleOptions.numDecaySteps": 9}


def quantised(type: str) -> Change:
    return {"spec.model.quantization": {"type": type}}


ADAMS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "muon", "schedule_free_adamw")
LIONS = ("lion_32bit", "lion_8bit")


def optimised(optimizer: str, **options: Any) -> Change:
    method = FULL if optimizer == "muon" else {}
    schedule = "constant" if optimizer == "schedule_free_adamw" else "linear"
    return method | {
        "spec.training.optimizer": optimizer,
        "spec.training.schedule": schedule,
        "spec.training.optimizerOptions": options,
    }


def scheduled(schedule: str, **options: Any) -> Change:
    return {"spec.training.schedule": schedule, "spec.training.scheduleOptions": options}


# What is drawn from the tables of tasks, methods and schedules: the fields that belong to some rows only ...
MARKS: list[Case] = [
    *(
        Case(
            message="spec.training.augmentation: applies to image-classification;",
            refused=task | {"spec.training.augmentation": {"verticalFlip": 0.5}},
            accepted=IMAGES | {"spec.training.augmentation": {"verticalFlip": 0.5}},
        )
        for task in (TEXTS, PICTURES)
    ),
    *(
        Case(
            message=f"spec.training.labelSmoothing: applies to {fitting('training.labelSmoothing')};",
            refused=task | SMOOTHED,
            accepted=TEXTS | SMOOTHED,
        )
        for task in (PREFERENCE, PICTURES)
    ),
    *(
        Case(
            message=f"spec.dataset.filter.{field}: applies to {fitting('dataset.filter.minTokens')};",
            refused=task | {f"spec.dataset.filter.{field}": 9},
            accepted=accepted | {f"spec.dataset.filter.{field}": 9},
        )
        for field in ("minTokens", "maxTokens")
        for task, accepted in ((PREFERENCE, CAUSAL), (IMAGES, TEXTS))
    ),
    *(
        Case(
            message=f"spec.training.neftuneNoiseAlpha: applies to {fitting('training.neftuneNoiseAlpha')};",
            refused=task | NOISY,
            accepted=CAUSAL | NOISY,
        )
        for task in (PREFERENCE, PICTURES, IMAGES)
    ),
    Case(
        message="spec.method.modulesToSave: applies to lora, qlora, adalora, ia3;",
        refused=FULL | SAVED,
        accepted=QLORA | SAVED,
    ),
    *(
        Case(
            message=f"spec.method.modulesToSave: applies to {fitting('method.modulesToSave')};",
            refused=task | SAVED,
            accepted=REWARD | SAVED,
        )
        for task in (PREFERENCE, PICTURES, GRPO)
    ),
    Case(
        message="spec.method.bias: applies to lora, qlora;",
        refused=FULL | BIASED,
        accepted=LORA | BIASED,
    ),
    *(
        Case(
            message=f"spec.method.bias: applies to {fitting('method.bias')};",
            refused=task | BIASED,
            accepted=REWARD | BIASED,
        )
        for task in (PREFERENCE, PICTURES, GRPO)
    ),
    Case(
        message="spec.training.optimizerOptions.loraplusLrRatio: applies to adamw_torch_fused, adamw_8bit,",
        refused=optimised("lion_8bit", loraplusLrRatio=16),
        accepted=optimised("paged_adamw_8bit", loraplusLrRatio=16),
    ),
    Case(
        message="spec.training.optimizerOptions.loraplusLrRatio: applies to lora, qlora;",
        refused=FULL | FASTER,
        accepted=QLORA | FASTER,
    ),
    *(
        Case(
            message=f"spec.training.scheduleOptions.{option}: applies to {', '.join(schedules)};",
            refused=scheduled("linear", **{option: value}),
            accepted=scheduled(schedule, **{option: value}),
        )
        for option, value, schedules in (
            ("numCycles", 2, (*COSINES, "warmup_stable_decay")),
            ("minLrRate", 0.2, COSINES[2:]),
            ("warmupLrRate", 0.2, COSINES[3:]),
            ("power", 2, ("polynomial",)),
            ("lrEnd", 1e-6, ("polynomial",)),
            ("timescale", 100, ("inverse_sqrt",)),
            ("numDecaySteps", 100, ("warmup_stable_decay",)),
            ("warmupType", "1-sqrt", ("warmup_stable_decay",)),
            ("decayType", "1-sqrt", ("warmup_stable_decay",)),
            ("minLrRatio", 0.1, ("warmup_stable_decay",)),
        )
        for schedule in schedules
    ),
    *(
        Case(
            message=f"spec.training.optimizerOptions.{option}: applies to {', '.join(optimizers)};",
            refused=optimised(refused, **{option: value}),
            accepted=optimised(optimizers[-1], **{option: value}),
        )
        for option, value, refused, optimizers in (
            ("beta1", 0.8, "adafactor", (*ADAMS[:3], *LIONS, *ADAMS[3:])),
            ("beta2", 0.8, "adafactor", (*ADAMS[:3], *LIONS, *ADAMS[3:])),
            ("epsilon", 1e-6, "lion_8bit", ADAMS),
            ("momentum", 0.9, "schedule_free_adamw", ("muon",)),
        )
    ),
    Case(
        message="spec.training.evalSteps: applies to steps;",
        refused=HELD_OUT | {"spec.training.evalEvery": "epoch", "spec.training.evalSteps": 10},
        accepted=HELD_OUT | {"spec.training.evalSteps": 10},
    ),
    Case(
        message="spec.training.saveSteps: applies to steps;",
        refused={"spec.training.saveEvery": "epoch", "spec.training.saveSteps": 10},
        accepted={"spec.training.saveSteps": 10},
    ),
    *(
        Case(
            message=f"spec.method.{field}: applies to {methods_with(f'method.{field}')};",
            refused=BITFIT | change,
            accepted=method | change,
        )
        for method in (LORA, QLORA)
        for field, change in {
            "rank": {"spec.method.rank": 4},
            "alpha": {"spec.method.alpha": 4},
            "dropout": {"spec.method.dropout": 0.1},
            "targetModules": {"spec.method.targetModules": ["q_proj"]},
            **PEFT,
        }.items()
    ),
    *(
        Case(
            message=f"spec.method.{field}: applies to {fitting(f'method.{field}')};",
            refused=PICTURES | LORA | change,
            accepted=IMAGES | LORA | change,
        )
        for field, change in PEFT.items()
    ),
    *(
        Case(
            message=f"spec.training.groupByLength: applies to {fitting('training.groupByLength')};",
            refused=task | {"spec.training.groupByLength": True},
            accepted=REWARD | {"spec.training.groupByLength": True},
        )
        for task in (GRPO, IMAGES)
    ),
    *(
        Case(
            message=f"spec.{field}: applies to {fitting(field)};",
            refused=IMAGES | change,
            accepted=task | change,
        )
        for task in (CAUSAL, PREFERENCE, REWARD, GRPO, TEXTS)
        for field, change in {
            "training.maxLength": {"spec.training.maxLength": 512},
            "training.attention": {"spec.training.attention": "eager"},
            "training.torchCompile": {"spec.training.torchCompile": True},
            "dataset.parseSpecialTokens": {"spec.dataset.parseSpecialTokens": True},
            "model.quantization": quantised("int8"),
            "model.resizeEmbeddings": FULL | {"spec.model.resizeEmbeddings": True},
            "model.addSpecialTokens": FULL | {"spec.model.addSpecialTokens": ["<|im_end|>"]},
        }.items()
    ),
    *(
        Case(
            message="spec.preference: applies to preference;",
            refused=task | {"spec.preference": {"beta": 0.2, "lossType": "ipo"}},
            accepted=PREFERENCE | {"spec.preference": {"beta": 0.2, "lossType": "ipo"}},
        )
        for task in (CAUSAL, TEXTS, REWARD)
    ),
    Case(
        message="spec.reward: applies to reward;",
        refused=GRPO | {"spec.reward": {"centerRewardsCoefficient": 0.01}},
        accepted=REWARD | {"spec.reward": {"centerRewardsCoefficient": 0.01}},
    ),
    *(
        Case(
            message=f"spec.{field}: applies to {fitting(field)};",
            refused=CAUSAL | change,
            accepted=task | change,
        )
        for task, field, change in (
            (TEXTS, "classification", {"spec.classification": {"balanced": True}}),
            (IMAGES, "classification", {"spec.classification": {"classWeights": {"cat": 2.0}}}),
            (SEQ2SEQ, "seq2seq", {"spec.seq2seq": {"beams": 4}}),
            (SPEECH, "speech", {"spec.speech": {"beams": 2}}),
            (TAGS, "tagging", {"spec.tagging": {"labelPieces": "all"}}),
            (QUESTIONS, "answering", {"spec.answering": {"stride": 64}}),
            (MASKED, "masking", {"spec.masking": {"unit": "word"}}),
            (EMBEDDING, "embedding", {"spec.embedding": {"pooling": "cls"}}),
            (SEQ2SEQ, "dataset.columns.source", {"spec.dataset.columns": {"source": "a"}}),
            (SEQ2SEQ, "dataset.columns.target", {"spec.dataset.columns": {"target": "a"}}),
            (TAGS, "dataset.columns.words", {"spec.dataset.columns": {"words": "a"}}),
            (TAGS, "dataset.columns.tags", {"spec.dataset.columns": {"tags": "a"}}),
            (QUESTIONS, "dataset.columns.question", {"spec.dataset.columns": {"question": "a"}}),
            (QUESTIONS, "dataset.columns.context", {"spec.dataset.columns": {"context": "a"}}),
            (QUESTIONS, "dataset.columns.answers", {"spec.dataset.columns": {"answers": "a"}}),
            (EMBEDDING, "dataset.columns.anchor", {"spec.dataset.columns": {"anchor": "a"}}),
            (EMBEDDING, "dataset.columns.positive", {"spec.dataset.columns": {"positive": "a"}}),
            (EMBEDDING, "dataset.columns.negative", {"spec.dataset.columns": {"negative": "a"}}),
            (PICTURES, "dataset.columns.prior", {"spec.dataset.columns": {"prior": "a"}}),
        )
    ),
    Case(
        message="spec.classification.problem: applies to text-classification;",
        refused=IMAGES | {"spec.classification": {"problem": "regression"}},
        accepted=TEXTS | {"spec.classification": {"problem": "regression"}},
    ),
    Case(
        message="spec.grpo: applies to grpo;",
        refused=rewarded(MATCHED) | REWARD,
        accepted=rewarded(MATCHED),
    ),
    *(
        Case(
            message=f"spec.{field}: applies to preference, reward;",
            refused=task | change,
            accepted=REWARD | change,
        )
        for task in (CAUSAL, TEXTS, IMAGES)
        for field, change in {
            "dataset.columns.chosen": {"spec.dataset.columns": {"chosen": "better"}},
            "dataset.columns.rejected": {"spec.dataset.columns": {"rejected": "worse"}},
        }.items()
    ),
    *(
        Case(
            message=f"spec.dataset.mergeLabels: applies to {fitting('dataset.mergeLabels')};",
            refused=refused | {"spec.dataset.mergeLabels": True},
            accepted=task | {"spec.dataset.mergeLabels": True},
        )
        for task, refused in ((TEXTS, CAUSAL), (IMAGES, PREFERENCE))
    ),
    *(
        Case(
            message=f"spec.dataset.columns.label: applies to {fitting('dataset.columns.label')};",
            refused=CAUSAL | {"spec.dataset.columns": {"label": "intent"}},
            accepted=task | {"spec.dataset.columns": {"label": "intent"}},
        )
        for task in (PREFERENCE, TEXTS)
    ),
    *(
        Case(
            message=f"spec.dataset.columns.text: applies to {fitting('dataset.columns.text')};",
            refused=refused | {"spec.dataset.columns": {"text": "body"}},
            accepted=task | {"spec.dataset.columns": {"text": "body"}},
        )
        for task, refused in ((CAUSAL, IMAGES), (TEXTS, PREFERENCE), (PICTURES, IMAGES))
    ),
    *(
        Case(
            message="spec.dataset.columns.image: applies to image-classification, text-to-image;",
            refused=refused | {"spec.dataset.columns": {"image": "photo"}},
            accepted=accepted | {"spec.dataset.columns": {"image": "photo"}},
        )
        for refused, accepted in [(CAUSAL, IMAGES), (TEXTS, PICTURES)]
    ),
    Case(
        message=f"spec.dataset.columns.audio: applies to {fitting('dataset.columns.audio')};",
        refused=TEXTS | {"spec.dataset.columns": {"audio": "clip"}},
        accepted=AUDIO | {"spec.dataset.columns": {"audio": "clip"}},
    ),
    Case(
        message=f"spec.training.maxSeconds: applies to {fitting('training.maxSeconds')};",
        refused=IMAGES | {"spec.training.maxSeconds": 5},
        accepted=AUDIO | {"spec.training.maxSeconds": 5},
    ),
    Case(
        message="spec.image: applies to text-to-image;",
        refused={"spec.image": {}},
        accepted=PICTURES | {"spec.image": {}},
    ),
    Case(
        message="image.bucketStep: must divide image.resolution, so that",
        refused=PICTURES | {"spec.image": {"resolution": 1024, "bucketStep": 48}},
        accepted=PICTURES | {"spec.image": {"resolution": 1024, "bucketStep": 64}},
    ),
    Case(
        message="image.cacheEncodings: keeps what text encoders make of captions, which",
        refused=PICTURES | {"spec.image": {"cacheEncodings": True, "trainTextEncoders": True}},
        accepted=PICTURES | {"spec.image": {"cacheEncodings": True}},
    ),
    Case(
        message="spec.image.priorLossWeight: weighs the images that dataset.columns.prior marks; set that column, or",
        refused=PICTURES | {"spec.image": {"priorLossWeight": 0.5}},
        accepted=PICTURES | {"spec.image": {"priorLossWeight": 0.5}, "spec.dataset.columns": {"prior": "class"}},
    ),
    Case(
        message=f"spec.model.job: applies to {fitting('model.job')}; set model.id or model.path",
        refused=PICTURES | {"spec.model": {"job": "tune"}},
        accepted=IMAGES | {"spec.model": {"job": "tune"}},
    ),
    *(
        Case(
            message=f"spec.model.{field}: applies to {fitting(f'model.{field}')};",
            refused=task | FULL | {"spec.model": {"config": {"modelType": "llama"}, "tokenizer": {}}},
            accepted=TEXTS | FULL | {"spec.model": {"config": {"modelType": "llama"}, "tokenizer": {}}},
        )
        for task in (PREFERENCE, REWARD, IMAGES)
        for field in ("config", "tokenizer")
    ),
    Case(
        message="spec.model.tokenizer: does not apply to a GenerateJob; remove it",
        refused={"spec.model": {"id": "org/model", "tokenizer": {}}},
        accepted={"spec.model": {"id": "org/model"}},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.{field}: applies to causal-lm;",
            refused=task | change,
            accepted=CAUSAL | change,
        )
        for task in (PREFERENCE, TEXTS, IMAGES)
        for field, change in {
            "training.packing": {"spec.training.packing": "isolated"},
            "dataset.columns.messages": {"spec.dataset.columns": {"messages": "turns"}},
            "dataset.columns.system": {"spec.dataset.columns": {"system": "rules"}},
            "dataset.columns.input": {"spec.dataset.columns": {"input": "context"}},
            "dataset.form": {"spec.dataset.form": "messages"},
            "training.lossOn": {"spec.training.lossOn": "all"},
        }.items()
    ),
    *(
        Case(
            message=f"spec.{field}: applies to causal-lm, preference{others};",
            refused=refused | change,
            accepted=accepted | change,
        )
        for field, others, refused, accepted, change in (
            *(
                (
                    "dataset.columns.tools",
                    ", reward",
                    refused,
                    accepted,
                    {"spec.dataset.columns": {"tools": "functions"}},
                )
                for refused, accepted in ((TEXTS, CAUSAL), (IMAGES, PREFERENCE), (TEXTS, REWARD))
            ),
            *(
                (
                    "dataset.chatTemplate",
                    ", reward, grpo",
                    refused,
                    accepted,
                    {"spec.dataset.chatTemplate": {"name": "zephyr"}},
                )
                for refused, accepted in ((TEXTS, CAUSAL), (IMAGES, PREFERENCE), (TEXTS, REWARD), (TEXTS, GRPO))
            ),
            *(
                (
                    "dataset.columns.completion",
                    "",
                    refused,
                    accepted,
                    {"spec.dataset.columns": {"completion": "answer"}},
                )
                for refused, accepted in ((TEXTS, CAUSAL), (REWARD, PREFERENCE))
            ),
        )
    ),
    Case(
        message="preference: desirableWeight and undesirableWeight apply to lossType kto; remove them, or",
        refused=PREFERENCE | {"spec.preference": {"undesirableWeight": 2}},
        accepted=PREFERENCE | {"spec.preference": {"undesirableWeight": 2, "lossType": "kto"}},
    ),
    *(
        Case(
            message="preference.labelSmoothing: robust needs it, and the other losses ignore it; set lossType: robust",
            refused=PREFERENCE | {"spec.preference": refused},
            accepted=PREFERENCE | {"spec.preference": {"lossType": "robust", "labelSmoothing": 0.1}},
        )
        for refused in ({"lossType": "robust"}, {"labelSmoothing": 0.1})
    ),
    Case(
        message="preference.precomputeReference: not with lossType kto, which compares answers to other prompts",
        refused=PREFERENCE | {"spec.preference": {"lossType": "kto", "precomputeReference": True}},
        accepted=PREFERENCE | {"spec.preference": {"lossType": "ipo", "precomputeReference": True}},
    ),
    *(
        Case(
            message="spec.dataset.columns.prompt: applies to causal-lm, preference, reward, grpo;",
            refused=refused | {"spec.dataset.columns": {"prompt": "question"}},
            accepted=accepted | {"spec.dataset.columns": {"prompt": "question"}},
        )
        for refused, accepted in ((TEXTS, CAUSAL), (IMAGES, PREFERENCE), (TEXTS, GRPO))
    ),
    *(
        Case(
            message=f"spec.training.lossOn: {form} works with {losses};",
            refused={"spec.dataset.form": form, "spec.training.lossOn": refused},
            accepted={"spec.dataset.form": form, "spec.training.lossOn": "all"},
        )
        for form, losses, refused in (
            ("messages", "assistant, all", "completions"),
            ("sharegpt", "assistant, all", "completions"),
            ("text", "all", "assistant"),
        )
    ),
    *(
        Case(
            message="spec.dataset.chatTemplate: set exactly one of name, file and text",
            refused={"spec.dataset.chatTemplate": template},
            accepted={"spec.dataset.chatTemplate": {"text": "{{ messages }}"}},
        )
        for template in ({}, {"name": "zephyr", "text": "{{ messages }}"})
    ),
    *(
        Case(
            message="spec.training.packing: applies to causal-lm;",
            refused=IMAGES | {"spec.training.packing": off},
            accepted=IMAGES,
        )
        for off in ("isolated", "none")
    ),
    Case(
        message="spec.model.quantization: applies to lora, qlora, adalora, ia3, prompt, p-tuning, prefix;",
        refused=FULL | quantised("nf4"),
        accepted=LORA | quantised("nf4"),
    ),
    *(
        Case(
            message=f"spec.method.{field}: applies to {methods_with(f'method.{field}')};",
            refused=LORA | {f"spec.method.{field}": value},
            accepted=method | {f"spec.method.{field}": value} | beside,
        )
        for field, value, method, beside in [
            ("initialRank", 64, ADALORA, {}),
            ("initialFraction", 0.2, ADALORA, {}),
            ("finalFraction", 0.2, ADALORA, {}),
            ("orthogonalWeight", 0.1, ADALORA, {}),
            ("feedforwardModules", ["a"], IA3, {"spec.method.targetModules": ["a"]}),
            ("virtualTokens", 5, PTUNING, {}),
            ("promptInit", "random", PROMPT, {}),
            ("promptText", "Say it.", PREFIX, {}),
            ("encoder", "lstm", PTUNING, {}),
            ("encoderHiddenSize", 9, PTUNING, {}),
            ("projection", True, PREFIX, {}),
            ("freeze", ["lm_head"], FULL, {}),
        ]
    ),
    *(
        Case(
            message=f"spec.model.{field}: applies to full, lora, qlora; the rows of new tokens learn with one of these",
            refused=PROMPT | {f"spec.model.{field}": value},
            accepted=LORA | {f"spec.model.{field}": value},
        )
        for field, value in (
            ("resizeEmbeddings", True),
            ("addSpecialTokens", ["<|a|>"]),
            ("tokenizer", {"train": {"vocabSize": 400}}),
        )
    ),
    *(
        Case(
            message="spec.model.config: applies to full; new weights are trained whole",
            refused=adapters | {"spec.model": {"config": {"modelType": "llama"}}},
            accepted=FULL | {"spec.model": {"config": {"modelType": "llama"}}},
        )
        for adapters in ({}, LORA, QLORA)
    ),
    Case(
        message="spec.text: applies to text-generation, summarization, translation, text2text-generation,",
        refused=PICTURES | {"spec.text": {}},
        accepted={"spec.text": {}},
        base=GENERATE,
    ),
    Case(
        message="spec.image: applies to text-to-image,",
        refused={"spec.image": {}},
        accepted=PICTURES | {"spec.image": {}},
        base=GENERATE,
    ),
    Case(
        message="spec.model.job: applies to text-classification, token-classification,",
        refused=PICTURES | {"spec.model": {"job": "tune"}},
        accepted={"spec.model": {"job": "tune"}},
        base=GENERATE,
    ),
    Case(
        message="spec.adapters.file: applies to text-to-image,",
        refused={"spec.adapters": [{"path": "/a", "file": "a.safetensors"}]},
        accepted=PICTURES | {"spec.adapters": [{"path": "/a", "file": "a.safetensors"}]},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.rows.negativePrompt: applies to text-to-image,",
        refused={"spec.inputs.rows": NEGATIVE},
        accepted=PICTURES | {"spec.inputs.rows": NEGATIVE},
        base=GENERATE,
    ),
    Case(
        message="spec.hub.contactSheet: applies to text-to-image, image-to-image;",
        refused={"spec.hub": PUBLISHED | {"contactSheet": 9}},
        accepted=PICTURES | {"spec.hub": PUBLISHED | {"contactSheet": 9}},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.rows.tools: applies to text-generation;",
        refused=PICTURES | {"spec.inputs.rows": [{"prompt": "a", "tools": "[]"}]},
        accepted={"spec.inputs.rows": [{"prompt": "a", "tools": "[]"}], "spec.text": {"chat": True}},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.columns.tools: applies to text-generation;",
        refused=PICTURES | {"spec.inputs": named("tools")},
        accepted={"spec.inputs": named("tools"), "spec.text": {"chat": True}},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.columns.negativePrompt: applies to text-to-image,",
        refused={"spec.inputs": {"dataset": {"files": ["/p.csv"]}, "columns": {"negativePrompt": "no"}}},
        accepted=PICTURES | {"spec.inputs": {"dataset": {"files": ["/p.csv"]}, "columns": {"negativePrompt": "no"}}},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.model.{field}: does not apply to a GenerateJob; remove it",
            refused=change,
            accepted={},
            base=GENERATE,
        )
        for field, change in {
            "resizeEmbeddings": {"spec.model.resizeEmbeddings": True},
            "addSpecialTokens": {"spec.model.addSpecialTokens": ["<|im_end|>"]},
            "config": {"spec.model": {"config": {"modelType": "llama"}}},
        }.items()
    ),
]
# ... and the values that suit some rows only.
CHOICES: list[Case] = [
    *(
        Case(
            message=f"spec.strategy: {optimizer} works with auto, ddp; choose one of these, or another training.opt",
            refused=optimised(optimizer) | {"spec.strategy": "zero2"},
            accepted=optimised(optimizer) | {"spec.strategy": "ddp"},
        )
        for optimizer in (*ADAMS[1:], *LIONS, "adafactor")
    ),
    Case(
        message="spec.method.type: muon works with full; choose that, or another training.optimizer",
        refused=optimised("muon") | LORA,
        accepted=optimised("muon"),
    ),
    Case(
        message="spec.training.schedule: schedule_free_adamw works with constant; choose that, or another",
        refused=optimised("schedule_free_adamw") | {"spec.training.schedule": "cosine"},
        accepted=optimised("schedule_free_adamw") | {"spec.training.warmupSteps": 10},
    ),
    *(
        Case(
            message=f"spec.training.metric: {task['spec.task']} works with {metrics}; choose",
            refused=task | COMPARED | {"spec.training.metric": refused},
            accepted=task | COMPARED | {"spec.training.metric": accepted},
        )
        for task, metrics, refused, accepted in [
            (CAUSAL, "evalLoss, perplexity", "accuracy", "perplexity"),
            (PREFERENCE, "evalLoss, rewardAccuracy, rewardMargin", "perplexity", "rewardMargin"),
            (REWARD, "evalLoss, rewardAccuracy, rewardMargin", "perplexity", "rewardAccuracy"),
            (GRPO, "evalLoss, reward", "perplexity", "reward"),
            (TEXTS, "evalLoss, accuracy, f1Macro, f1Micro, mse, mae, pearson", "perplexity", "f1Macro"),
            (SEQ2SEQ, "evalLoss, exactMatch, rouge1, rouge2, rougeL, bleu", "accuracy", "rougeL"),
            (TAGS, "evalLoss, accuracy, precision, recall, f1, f1Macro", "bleu", "f1"),
            (QUESTIONS, "evalLoss, exactMatch, f1", "f1Macro", "f1"),
            (MASKED, "evalLoss, accuracy, perplexity", "f1", "perplexity"),
            (EMBEDDING, "evalLoss, recallAt1, mrr, tripletAccuracy", "f1", "mrr"),
            (IMAGES, "evalLoss, accuracy, f1Macro", "rewardMargin", "accuracy"),
            (AUDIO, "evalLoss, accuracy, f1Macro", "rewardMargin", "accuracy"),
            (SPEECH, "evalLoss, wer, cer", "bleu", "cer"),
            (PICTURES, "evalLoss", "perplexity", "evalLoss"),
        ]
    ),
    *(
        Case(
            message=(
                "spec.method.type: image-classification works with full, bitfit, lora, adalora, ia3; choose one of"
            ),
            refused=IMAGES | QLORA,
            accepted=accepted,
        )
        for accepted in (IMAGES | LORA, IMAGES | FULL, TEXTS | QLORA, CAUSAL | QLORA)
    ),
    *(
        Case(message=message.format(task["spec.task"]), refused=task | refused, accepted=task | accepted)
        for task in (AUDIO, SPEECH)
        for message, refused, accepted in (
            ("spec.method.type: {} works with full, bitfit, lora, adalora, ia3; choose", QLORA, LORA),
            ("spec.strategy: {} works with", {"spec.strategy": "zero3"}, {"spec.strategy": "zero2"}),
        )
    ),
    *(
        Case(
            message="spec.method.type: text-to-image works with lora; choose that, or another task (diffusers loads",
            refused=PICTURES | method,
            accepted=PICTURES | LORA,
        )
        for method in (FULL, QLORA)
    ),
    *(
        Case(
            message="spec.strategy: text-to-image works with auto, ddp; choose one of these, or another task",
            refused=PICTURES | {"spec.strategy": refused},
            accepted=PICTURES | {"spec.strategy": accepted},
        )
        for refused, accepted in [("zero2", "auto"), ("zero3", "ddp")]
    ),
    *(
        Case(
            message=(
                f"spec.dataset.format: {task['spec.task']} works with {formats}; choose one of these, or another task"
            ),
            refused=task | {"spec.dataset.format": refused},
            accepted=task | {"spec.dataset.format": accepted},
        )
        for task, formats, refused, accepted in [
            (IMAGES, "imagefolder, parquet, arrow, webdataset", "csv", "imagefolder"),
            (IMAGES, "imagefolder, parquet, arrow, webdataset", "text", "parquet"),
            (PICTURES, "imagefolder, parquet, arrow, webdataset", "jsonl", "imagefolder"),
            (AUDIO, "csv, json, jsonl, parquet, arrow", "text", "csv"),
            (SPEECH, "csv, json, jsonl, parquet, arrow", "text", "csv"),
            (CAUSAL, "csv, json, jsonl, parquet, arrow, text, webdataset", "imagefolder", "text"),
            (TEXTS, "csv, json, jsonl, parquet, arrow, webdataset", "text", "jsonl"),
            (TEXTS, "csv, json, jsonl, parquet, arrow, webdataset", "imagefolder", "csv"),
            *(
                (task, "csv, json, jsonl, parquet, arrow, webdataset", "text", "jsonl")
                for task in (SEQ2SEQ, TAGS, QUESTIONS, EMBEDDING)
            ),
            (MASKED, "csv, json, jsonl, parquet, arrow, text, webdataset", "imagefolder", "text"),
            (PREFERENCE, "csv, json, jsonl, parquet, arrow, webdataset", "text", "jsonl"),
            (REWARD, "csv, json, jsonl, parquet, arrow, webdataset", "text", "jsonl"),
            (GRPO, "csv, json, jsonl, parquet, arrow, webdataset", "text", "jsonl"),
        ]
    ),
    *(
        Case(
            message=f"spec.strategy: {task['spec.task']} works with auto, ddp, zero1, zero2, zero2-offload; choose",
            refused=task | {"spec.strategy": refused},
            accepted=task | {"spec.strategy": accepted},
        )
        for task in (PREFERENCE, REWARD, GRPO)
        for refused, accepted in [("zero3", "zero2"), ("zero3-offload", "zero2-offload")]
    ),
    *(
        Case(
            message=message if message.startswith(("model: set", "model.rev")) else f"rewards.{message}",
            refused=rewarded(refused),
            accepted=rewarded(accepted),
        )
        for message, refused, accepted in [
            ("column: a reward of type exactMatch needs it", {"type": "exactMatch"}, MATCHED),
            ("pattern: a reward of type regex needs it", {"type": "regex"}, {"type": "regex", "pattern": "a"}),
            ("tokens: a reward of type length needs it", {"type": "length"}, {"type": "length", "tokens": 9}),
            ("model: a reward of type model needs it", {"type": "model"}, {"type": "model", "model": {"job": "rm"}}),
            ("column: applies to exactMatch; remove it", {"type": "json", "column": "a"}, {"type": "json"}),
            (
                "pattern: applies to exactMatch, regex; remove it",
                {"type": "json", "pattern": "a"},
                MATCHED | {"pattern": "#### (.+)"},
            ),
            ("tokens: applies to length; remove it", MATCHED | {"tokens": 9}, {"type": "length", "tokens": 9}),
            (
                "shorter: applies to length; remove it",
                {"type": "json", "shorter": True},
                {"type": "length", "tokens": 9, "shorter": True},
            ),
            ("keys: applies to json; remove it", MATCHED | {"keys": ["a"]}, {"type": "json", "keys": ["a"]}),
            (
                "model: applies to model; remove it",
                {"type": "json", "model": {"id": "a/b"}},
                {"type": "model", "model": {"id": "a/b", "revision": "main"}},
            ),
            ("file: a reward of type python needs it", {"type": "python"}, PYTHON),
            ("file: applies to python; remove it", {"type": "json", "file": "/r.py"}, PYTHON),
            ("function: applies to python; remove it", MATCHED | {"function": "a"}, PYTHON | {"function": "a"}),
            ("columns: applies to python; remove it", MATCHED | {"columns": ["a"]}, PYTHON | {"columns": ["a"]}),
            ("timeoutSeconds: applies to python;", MATCHED | {"timeoutSeconds": 9}, PYTHON | {"timeoutSeconds": 9}),
            (
                "model: set exactly one of id, path and job",
                {"type": "model", "model": {"id": "a/b", "job": "rm"}},
                {"type": "model", "model": {"path": "/models/rm"}},
            ),
            (
                "model.revision: only a model of the Hub has revisions",
                {"type": "model", "model": {"job": "rm", "revision": "main"}},
                {"type": "model", "model": {"job": "rm"}},
            ),
        ]
    ),
    *(
        Case(
            message="spec.grpo.rewards: the task grpo needs a reward",
            refused=refused,
            accepted=GRPO,
        )
        for refused in ({"spec.task": "grpo"}, rewarded())
    ),
    Case(
        message="spec.tracking.secretRef: the pods of run would hold credentials that the code of a reward of type",
        refused=rewarded(PYTHON) | {"spec.tracking": [TRACKED]},
        accepted=rewarded(MATCHED) | {"spec.tracking": [TRACKED]},
    ),
    Case(
        message="spec.grpo.generations: training.batchSize counts completions, and must be a multiple of generations",
        refused=rewarded(MATCHED, generations=3),
        accepted=rewarded(MATCHED, generations=4),
    ),
    *(
        Case(
            message="spec.grpo.maxCompletionLength: leaves no room for a prompt; choose less than training.maxLength",
            refused=rewarded(MATCHED, maxCompletionLength=length) | refused,
            accepted=rewarded(MATCHED, maxCompletionLength=length) | accepted,
        )
        for length, refused, accepted in [
            (1024, {}, {"spec.training.maxLength": 1025}),
            (64, {"spec.training.maxLength": 64}, {"spec.training.maxLength": 65}),
        ]
    ),
    *(
        Case(
            message="spec.model.quantization.type: qlora works with nf4; choose that, or another method.type",
            refused=QLORA | quantised(refused),
            accepted=accepted,
        )
        for refused, accepted in [("int8", QLORA | quantised("nf4")), ("fp4", LORA | quantised("fp4"))]
    ),
    *(
        Case(
            message=f"spec.strategy: {name} works with auto, ddp, zero1, zero2, zero2-offload; choose one of these",
            refused=change | {"spec.strategy": refused},
            accepted=change | {"spec.strategy": accepted},
        )
        for refused, accepted in [("zero3", "zero2"), ("zero3-offload", "zero2-offload")]
        for name, change in {
            "qlora": QLORA,
            "nf4": LORA | quantised("nf4"),
            "fp4": LORA | quantised("fp4"),
        }.items()
    ),
    *(
        Case(
            message=f"spec.method.type: {task['spec.task']} works with full, lora, qlora; choose one of these",
            refused=task | ADALORA,
            accepted=task | LORA,
        )
        for task in (
            PREFERENCE,
            REWARD,
            GRPO,
            *({"spec.task": name} for name, task in TRAINING_TASKS.items() if task.why.get("methods") == UNPROVEN),
        )
    ),
    *(
        Case(
            message=f"spec.strategy: {method['spec.method']['type']} works with auto, ddp; choose one of these",
            refused=method | {"spec.strategy": "zero2"},
            accepted=method | {"spec.strategy": "ddp"},
        )
        for method in (ADALORA, IA3, PROMPT, PTUNING, PREFIX)
    ),
    *(
        Case(
            message=f"spec.training.packing: {method['spec.method']['type']} works with none, concatenate; choose",
            refused=method | {"spec.training.packing": "isolated"},
            accepted=method | {"spec.training.packing": "concatenate"},
        )
        for method in (PROMPT, PTUNING, PREFIX)
    ),
    Case(
        message="spec.training.gradientCheckpointing: not with prefix, because PEFT (0.21) gives the prefix as a cache",
        refused=PREFIX | {"spec.training.gradientCheckpointing": True},
        accepted=PROMPT | {"spec.training.gradientCheckpointing": True},
    ),
    Case(
        message="method.initialRank: adalora takes ranks away until `rank` are left on average; choose more than rank",
        refused=ADALORA | {"spec.method.rank": 12},
        accepted=ADALORA | {"spec.method.rank": 12, "spec.method.initialRank": 16},
    ),
    Case(
        message="method.finalFraction: no steps are left between initialFraction and finalFraction; choose less",
        refused=ADALORA | {"spec.method.initialFraction": 0.75},
        accepted=ADALORA | {"spec.method.initialFraction": 0.75, "spec.method.finalFraction": 0.2},
    ),
    *(
        Case(
            message="method.promptInit: text needs promptText, and the others ignore it; set both, or one",
            refused=PROMPT | refused,
            accepted=PROMPT | {"spec.method.promptInit": "text", "spec.method.promptText": "a"},
        )
        for refused in (
            {"spec.method.promptInit": "text"},
            {"spec.method.promptInit": "random", "spec.method.promptText": "a"},
        )
    ),
    Case(
        message="method.encoderHiddenSize: a prefix without projection has no network; set projection: true, or remove",
        refused=PREFIX | {"spec.method.encoderHiddenSize": 9},
        accepted=PREFIX | {"spec.method.encoderHiddenSize": 9, "spec.method.projection": True},
    ),
    *(
        Case(
            message="method.feedforwardModules: names some of targetModules; set both, or remove it",
            refused=IA3 | {"spec.method.feedforwardModules": ["up_proj"]} | refused,
            accepted=IA3 | {"spec.method.feedforwardModules": ["up_proj"]} | accepted,
        )
        for refused, accepted in (
            ({}, {"spec.method.targetModules": ["up_proj", "k_proj"]}),
            ({"spec.method.targetModules": ["k_proj"]}, {"spec.method.targetModules": ["all-linear"]}),
        )
    ),
    *(
        Case(
            "spec.strategy: int8 works with auto, ddp; choose one of these",
            LORA | quantised("int8") | {"spec.strategy": refused},
            LORA | quantised("int8") | {"spec.strategy": accepted},
        )
        for refused, accepted in [("zero2", "auto"), ("zero3", "ddp")]
    ),
]
CASES: list[Case] = [
    *(
        Case(
            message=message,
            refused={"spec.model": {"id": "org/model", "tokenizer": refused}},
            accepted={"spec.model": {"id": "org/model", "tokenizer": accepted}},
        )
        for message, refused, accepted in (
            ("model.tokenizer.train: set vocabSize to", {}, {"train": {"vocabSize": 400}}),
            ("model.tokenizer.train: set vocabSize to", {"train": {}}, {"train": {"specialTokens": ["<|im_end|>"]}}),
            (
                "model.tokenizer.train.type: the tokenizer of a trained model gets more pieces and keeps its type;",
                {"train": {"type": "bpe", "vocabSize": 400}},
                {"train": {"vocabSize": 400}},
            ),
        )
    ),
    Case(
        message="model.tokenizer.train.vocabSize: config.vocabSize says it, too; set one of them",
        refused=NEW_MODEL
        | {
            "spec.model": {
                "config": {"modelType": "llama", "vocabSize": 400},
                "tokenizer": {"train": {"vocabSize": 400}},
            }
        },
        accepted=NEW_MODEL
        | {"spec.model": {"config": {"modelType": "llama"}, "tokenizer": {"train": {"vocabSize": 400}}}},
    ),
    *(
        Case(
            message=message,
            refused=IMAGES | {"spec.training.augmentation": refused},
            accepted=IMAGES | {"spec.training.augmentation": accepted},
        )
        for message, refused, accepted in (
            ("augmentation: changes nothing; set crop, horizontalFlip,", {}, {"horizontalFlip": 1}),
            ("colorJitter: changes nothing; set", {"colorJitter": {}}, {"colorJitter": {"hue": 0.1}}),
            ("crop.scale: is a least and a", {"crop": {"scale": [0.9, 0.5]}}, {"crop": {"scale": [0.5, 1]}}),
            ("crop.scale: is a least and a", {"crop": {"scale": [0, 1]}}, {"crop": {}}),
            ("crop.ratio: is a least and a", {"crop": {"ratio": [2, 1]}}, {"crop": {"ratio": [1, 2]}}),
        )
    ),
    Case(
        message="classification: balanced computes the weights that classWeights would name; remove one of them",
        refused=TEXTS | {"spec.classification": {"balanced": True, "classWeights": {"a": 2}}},
        accepted=TEXTS | {"spec.classification": {"balanced": False, "classWeights": {"a": 2}}},
    ),
    *(
        Case(
            message="classification.problem: classes are weighted where each row has one; remove balanced and",
            refused=TEXTS | {"spec.classification": {"problem": problem} | weights},
            accepted=TEXTS | {"spec.classification": {"problem": "single"} | weights},
        )
        for problem, weights in (("multi-label", {"balanced": True}), ("regression", {"classWeights": {"a": 2}}))
    ),
    *(
        Case(
            message=f"spec.{field}: belongs to rows with one class each; remove it, or use problem: single",
            refused=TEXTS | change | {"spec.classification": {"problem": "multi-label"}},
            accepted=TEXTS | change | {"spec.classification": {"problem": "single"}},
        )
        for field, change in (
            ("training.labelSmoothing", SMOOTHED),
            ("dataset.mergeLabels", {"spec.dataset.mergeLabels": True}),
        )
    ),
    *(
        Case(
            message=f"spec.training.metric: classification.problem {problem} has {metrics}; choose one of these",
            refused=TEXTS | COMPARED | settings | {"spec.training.metric": refused},
            accepted=TEXTS | COMPARED | settings | {"spec.training.metric": accepted},
        )
        for problem, settings, metrics, refused, accepted in (
            ("single", {}, "evalLoss, accuracy, f1Macro", "mse", "accuracy"),
            (
                "multi-label",
                {"spec.classification": {"problem": "multi-label"}},
                "evalLoss, accuracy, f1Micro, f1Macro",
                "pearson",
                "f1Micro",
            ),
            (
                "regression",
                {"spec.classification": {"problem": "regression"}},
                "evalLoss, mse, mae, pearson",
                "accuracy",
                "pearson",
            ),
        )
    ),
    Case(
        message="spec.speech.beams: with 0 no texts are written that the metric could rate; use metric: evalLoss,",
        refused=SPEECH | COMPARED | {"spec.speech": {"beams": 0}, "spec.training.metric": "wer"},
        accepted=SPEECH | COMPARED | {"spec.speech": {"beams": 2}, "spec.training.metric": "wer"},
    ),
    Case(
        message="spec.seq2seq.beams: with 0 no texts are written that the metric could rate; use metric: evalLoss,",
        refused=SEQ2SEQ | COMPARED | {"spec.seq2seq": {"beams": 0}, "spec.training.metric": "bleu"},
        accepted=SEQ2SEQ | COMPARED | {"spec.seq2seq": {"beams": 2}, "spec.training.metric": "bleu"},
    ),
    *(
        Case(
            message="spec.training.batchSize: texts are told apart from those of other rows of the same micro-batch,",
            refused=EMBEDDING | refused,
            accepted=EMBEDDING | accepted,
        )
        for refused, accepted in (
            ({"spec.training.batchSize": 1}, {"spec.training.batchSize": 2}),
            (
                {"spec.training.batchSize": 8, "spec.training.microBatchSize": 1},
                {"spec.training.batchSize": 8, "spec.training.microBatchSize": 2},
            ),
        )
    ),
    *MARKS,
    *CHOICES,
    # names
    Case(
        message="metadata.name: at most 40 characters",
        refused={"metadata.name": "a" * 41},
        accepted={"metadata.name": "a" * 40},
    ),
    Case(
        message="metadata.name: lower-case letters",
        refused={"metadata.name": "a.b"},
        accepted={"metadata.name": "a-b"},
    ),
    Case(
        message="metadata.name: at most 39",
        refused={"metadata.name": "a" * 40, "spec.resources.nodes": 11, "spec.training.batchSize": 11},
        accepted={"metadata.name": "a" * 39, "spec.resources.nodes": 11, "spec.training.batchSize": 11},
    ),
    Case(
        message="metadata.name: at most 39",
        refused={"metadata.name": "a" * 39, "spec.resources.nodes": 101, "spec.training.batchSize": 101},
        accepted={"metadata.name": "a" * 40, "spec.resources.nodes": 10, "spec.training.batchSize": 10},
    ),
    # sources
    Case(
        message="model: set exactly one of",
        refused={"spec.model.path": "/models/m"},
        accepted={"spec.model": {"path": "/models/m"}},
    ),
    Case(
        message="model.revision:",
        refused={"spec.model": {"path": "/m", "revision": "v1"}},
        accepted={"spec.model.revision": "v1"},
    ),
    Case(
        message="dataset: set exactly one of id and files",
        base=GENERATE,
        refused={"spec.inputs": {"dataset": {"id": "org/data", "files": ["/x"]}}},
        accepted={"spec.inputs": {"dataset": {"files": ["/x"]}}},
    ),
    Case(
        message="dataset.revision:",
        refused={"spec.dataset.revision": "v1"},
        accepted={"spec.dataset": {"id": "org/data", "revision": "v1"}},
    ),
    Case(
        message="dataset.name:",
        refused={"spec.dataset.name": "en"},
        accepted={"spec.dataset": {"id": "org/data", "name": "en"}},
    ),
    Case(
        message="dataset.format:",
        refused={"spec.dataset": {"id": "org/data", "format": "csv"}},
        accepted={"spec.dataset.format": "csv"},
    ),
    *(
        Case(
            message="dataset.csv:",
            refused=refused,
            accepted=accepted,
            base=base,
        )
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
    Case(
        message="dataset.format: archives of WebDataset are read by FineTuneJobs only",
        base=GENERATE,
        refused={"spec.inputs": {"dataset": {"files": ["/x"], "format": "webdataset"}}},
        accepted={"spec.inputs": {"dataset": {"files": ["/x"], "format": "parquet"}}},
    ),
    *(
        Case(
            message="dataset.encoding:",
            refused={"spec.dataset": refused},
            accepted={"spec.dataset": accepted},
        )
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
        message="dataset: set at most one of",
        refused={"spec.dataset.evalSplit": "test", "spec.dataset.evalFraction": 0.1},
        accepted={"spec.dataset.evalFraction": 0.1},
    ),
    Case(
        message="dataset: set exactly one of",
        refused={"spec.dataset": {"id": "org/data", "mix": {"sources": [{"id": "org/a"}, {"id": "org/b"}]}}},
        accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"files": ["/b.jsonl"]}]}}},
    ),
    Case(
        message="dataset.mix: split and evalSplit belong to each",
        refused={"spec.dataset": {"evalSplit": "test", "mix": {"sources": [{"id": "org/a"}, {"id": "org/b"}]}}},
        accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"id": "org/b", "evalSplit": "test"}]}}},
    ),
    Case(
        message="mix.sources: some have a weight",
        refused={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"id": "org/b", "weight": 1}]}}},
        accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a", "weight": 2}, {"id": "org/b", "weight": 1}]}}},
    ),
    Case(
        message="sources: set exactly one of",
        refused={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"weight": 1}]}}},
        accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"files": ["/b"], "format": "csv"}]}}},
    ),
    *(
        Case(
            message=f"sources.{message}",
            refused={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, refused]}}},
            accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, accepted]}}},
        )
        for message, refused, accepted in [
            ("revision:", {"files": ["/b"], "revision": "v1"}, {"id": "org/b", "revision": "v1"}),
            ("name:", {"files": ["/b"], "name": "en"}, {"id": "org/b", "name": "en"}),
            ("format:", {"id": "org/b", "format": "csv"}, {"files": ["/b"], "format": "csv"}),
            ("csv:", {"files": ["/b"], "format": "json", "csv": {}}, {"files": ["/b"], "csv": {}}),
            (
                "encoding:",
                {"files": ["/b"], "format": "parquet", "encoding": "cp1252"},
                {"files": ["/b"], "encoding": "cp1252"},
            ),
        ]
    ),
    Case(
        message="sources.split: files are one split",
        refused={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"files": ["/b"], "split": "test"}]}}},
        accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"files": ["/b"], "split": "train[:9]"}]}}},
    ),
    Case(
        message="sources.evalSplit: files are one split",
        refused={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"files": ["/b"], "evalSplit": "test"}]}}},
        accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"id": "org/b", "evalSplit": "test"}]}}},
    ),
    Case(
        message="sources.evalSplit: is also the training split",
        refused={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"id": "org/b", "evalSplit": "train"}]}}},
        accepted={"spec.dataset": {"mix": {"sources": [{"id": "org/a"}, {"id": "org/b", "evalSplit": "test"}]}}},
    ),
    Case(
        message="columns: a filter needs at least one of",
        refused={"spec.dataset.filter": {"columns": [{"column": "lang"}]}},
        accepted={"spec.dataset.filter": {"columns": [{"column": "lang", "values": ["en"]}]}},
    ),
    Case(
        message="filter: set at least one of",
        refused={"spec.dataset.filter": {}},
        accepted={"spec.dataset.filter": {"maxCharacters": 1}},
    ),
    Case(
        message="filter.minTokens: is more than",
        refused={"spec.dataset.filter": {"minTokens": 2, "maxTokens": 1}},
        accepted={"spec.dataset.filter": {"minTokens": 1, "maxTokens": 1}},
    ),
    Case(
        message="filter.minCharacters: is more than",
        refused={"spec.dataset.filter": {"minCharacters": 2, "maxCharacters": 1}},
        accepted={"spec.dataset.filter": {"minCharacters": 1, "maxCharacters": 1}},
    ),
    Case(
        message="dataset.evalFiles:",
        refused={"spec.dataset": {"id": "org/data", "evalFiles": ["/e"]}},
        accepted={"spec.dataset.evalFiles": ["/e"]},
    ),
    Case(
        message="dataset.split:",
        refused={"spec.dataset.split": "test"},
        accepted={"spec.dataset.split": "train[:10%]+train[20%:]"},
    ),
    Case(
        message="stores.account: belongs to az",
        refused={"spec.stores": [{"type": "s3", "account": "lutes"}]},
        accepted={"spec.stores": [{"type": "az", "account": "lutes"}]},
    ),
    Case(
        message="stores.region: belongs to s3",
        refused={"spec.stores": [{"type": "gs", "region": "eu-central-1"}]},
        accepted={"spec.stores": [{"type": "s3", "region": "eu-central-1"}]},
    ),
    Case(
        message="stores.anonymous:",
        refused={"spec.stores": [kept("gs", "serviceAccountKey") | {"anonymous": True}]},
        accepted={"spec.stores": [{"type": "gs", "anonymous": True}]},
    ),
    Case(
        message="stores.secretRef.keys: s3 takes accessKeyId and secretAccessKey, or",
        refused={"spec.stores": [kept("s3", "accessKeyId")]},
        accepted={"spec.stores": [kept("s3", "accessKeyId", "secretAccessKey", "sessionToken")]},
    ),
    Case(
        message="stores.secretRef.keys: gs takes serviceAccountKey",
        refused={"spec.stores": [kept("gs", "accountKey")]},
        accepted={"spec.stores": [kept("gs", "serviceAccountKey")]},
    ),
    Case(
        message="stores.secretRef.keys: az takes accountKey, or sasToken",
        refused={"spec.stores": [kept("az", "accountKey", "sasToken")]},
        accepted={"spec.stores": [kept("az", "sasToken")]},
    ),
    Case(
        message="tracking.url:",
        refused={"spec.tracking": [{"type": "mlflow"}]},
        accepted={"spec.tracking": [{"type": "mlflow", "url": "http://mlflow:5000"}]},
    ),
    Case(
        message="tracking.url:",
        refused={"spec.tracking": [{"type": "tensorboard", "url": "http://mlflow:5000"}]},
        accepted={"spec.tracking": [{"type": "tensorboard"}]},
    ),
    Case(
        message="tracking.runName:",
        refused={"spec.tracking": [{"type": "tensorboard", "runName": "a"}]},
        accepted={"spec.tracking": [MLFLOW | {"runName": "a"}]},
    ),
    Case(
        message="tracking.experiment:",
        refused={"spec.tracking": [{"type": "tensorboard", "experiment": "a"}]},
        accepted={"spec.tracking": [MLFLOW | {"experiment": "a"}]},
    ),
    Case(
        message="tracking.tags:",
        refused={"spec.tracking": [{"type": "tensorboard", "tags": {"a": "b"}}]},
        accepted={"spec.tracking": [MLFLOW | {"tags": {"a": "b"}}]},
    ),
    Case(
        message="tracking.secretRef:",
        refused={"spec.tracking": [{"type": "tensorboard", "secretRef": {"name": "a", "keys": {"token": "t"}}}]},
        accepted={"spec.tracking": [MLFLOW | {"secretRef": {"name": "a", "keys": {"token": "t"}}}]},
    ),
    Case(
        message="tracking.secretRef.keys: wandb takes apiKey",
        refused={"spec.tracking": [{"type": "wandb", "secretRef": {"name": "a", "keys": {"token": "t"}}}]},
        accepted={"spec.tracking": [{"type": "wandb", "secretRef": {"name": "a", "keys": {"apiKey": "t"}}}]},
    ),
    Case(
        message="tracking.url: trackio cannot do without; set it",
        refused={"spec.tracking": [{key: TRACKIO[key] for key in ("type", "secretRef")}]},
        accepted={"spec.tracking": [TRACKIO]},
    ),
    Case(
        message="tracking.secretRef: trackio cannot do without; set it",
        refused={"spec.tracking": [{key: TRACKIO[key] for key in ("type", "url")}]},
        accepted={"spec.tracking": [TRACKIO]},
    ),
    Case(
        message="tracking.tags: belongs to mlflow and wandb; remove it",
        refused={"spec.tracking": [TRACKIO | {"tags": {"a": "b"}}]},
        accepted={"spec.tracking": [TRACKIO | {"runName": "a", "experiment": "b"}]},
    ),
    Case(
        message="tracking.secretRef.keys: trackio takes writeToken",
        refused={"spec.tracking": [TRACKIO | {"secretRef": {"name": "a", "keys": {"token": "t"}}}]},
        accepted={"spec.tracking": [TRACKIO]},
    ),
    Case(
        message="tracking.secretRef.keys: mlflow takes token, or username and password",
        refused={"spec.tracking": [MLFLOW | {"secretRef": {"name": "a", "keys": {"username": "u", "token": "t"}}}]},
        accepted={"spec.tracking": [MLFLOW | {"secretRef": {"name": "a", "keys": {"username": "u", "password": "p"}}}]},
    ),
    Case(
        message="dataset.split:",
        refused={"spec.dataset.split": "trainer"},
        accepted={"spec.dataset": {"id": "org/data", "split": "trainer"}},
    ),
    Case(
        message="dataset.split:",
        refused={"spec.inputs": {"dataset": {"files": ["/p.jsonl"], "split": "test"}}},
        accepted={"spec.inputs": {"dataset": {"files": ["/p.jsonl"], "split": "train[:9]"}}},
        base=GENERATE,
    ),
    Case(
        message="dataset.evalSplit: files",
        refused={"spec.dataset.evalSplit": "test"},
        accepted={"spec.dataset.evalSplit": "train[90%:]"},
    ),
    Case(
        message="dataset.evalSplit: is also the training split",
        refused={"spec.dataset.evalSplit": "train"},
        accepted={"spec.dataset": {"id": "org/data", "evalSplit": "validation"}},
    ),
    Case(
        message="spec.model.job: is this job",
        refused={"spec.model": {"job": "sound"}},
        accepted={"spec.model": {"job": "another"}},
    ),
    # where work lies
    Case(
        message="workspace: size",
        refused={"spec.workspace": {"claimName": "mine", "size": "1Gi"}},
        accepted={"spec.workspace": {"claimName": "mine"}},
    ),
    Case(
        message="workspace.whenDeleted:",
        refused={"spec.workspace": {"claimName": "mine", "whenDeleted": "Delete"}},
        accepted={"spec.workspace": {"whenDeleted": "Delete"}},
    ),
    Case(
        message="workspace.ownership:",
        refused={"spec.workspace": {"size": "1Gi", "ownership": "Change"}},
        accepted={"spec.workspace": {"claimName": "mine", "ownership": "Change"}},
    ),
    Case(
        message="volumes: set exactly one",
        refused={"spec.volumes": [{"claimName": "a", "configMap": "b", "mountPath": "/data"}]},
        accepted={"spec.volumes": [{"configMap": "b", "mountPath": "/data"}]},
    ),
    *(
        Case(
            message="volumes.mountPath:",
            refused=mounted(taken),
            accepted=mounted(free),
        )
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
        message="spec.workspace.accessMode:",
        refused={"spec.workspace": {"accessMode": "ReadWriteOncePod"}, "spec.resources.nodes": 2},
        accepted={"spec.workspace": {"accessMode": "ReadWriteOncePod"}},
    ),
    Case(
        message="spec.workspace.accessMode:",
        refused={"spec.workspace": {"accessMode": "ReadWriteOncePod"}, "spec.shards": 2},
        accepted={"spec.workspace": {"accessMode": "ReadWriteMany"}, "spec.shards": 2},
        base=GENERATE,
    ),
    Case(
        message="tolerations.value:",
        refused={"spec.scheduling.tolerations": [{"key": "gpu", "operator": "Exists", "value": "yes"}]},
        accepted={
            "spec.scheduling.tolerations": [{"key": "gpu", "operator": "Exists"}, {"key": "gpu", "value": "yes"}]
        },
    ),
    *(
        Case(
            message=f"scheduling.{field}:",
            refused={f"spec.scheduling.{field}": {key: "x"}},
            accepted={f"spec.scheduling.{field}": {other: "x"}},
        )
        for field in ("labels", "annotations")
        for key, other in (
            ("luthier.dev/phase", "luthier.device/phase"),
            ("app.kubernetes.io/managed-by", "app.kubernetes.io/part-of"),
            ("batch.kubernetes.io/job-completion-index", "karpenter.sh/do-not-disrupt"),
            ("jobset.sigs.k8s.io/restart-attempt", "cluster-autoscaler.kubernetes.io/safe-to-evict"),
            ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/podset-preferred-topology"),
            ("job-name", "job-names"),
        )
    ),
    *(
        Case(
            message="matchExpressions.values: In,",
            refused=node_expression(operator=operator, values=refused),
            accepted=node_expression(operator=operator, values=accepted),
        )
        for operator, refused, accepted in (
            ("In", [], ["h100", "a100"]),
            ("NotIn", [], ["t4"]),
            ("Exists", ["h100"], []),
            ("DoesNotExist", ["h100"], []),
        )
    ),
    Case(
        message="matchExpressions.values: Gt and Lt",
        refused=node_expression(operator="Gt", values=["many"]),
        accepted=node_expression(operator="Gt", values=["4"]),
    ),
    Case(
        message="labelSelector.matchExpressions:",
        refused=pod_term(matchExpressions=[{"key": "cores", "operator": "Lt", "values": ["4"]}]),
        accepted=pod_term(matchExpressions=[{"key": "app", "operator": "In", "values": ["cache"]}]),
    ),
    Case(
        message="topologySpreadConstraints.minDomains:",
        refused={"spec.scheduling.topologySpreadConstraints": [{"topologyKey": "zone", "minDomains": 2}]},
        accepted={
            "spec.scheduling.topologySpreadConstraints": [
                {"topologyKey": "zone", "minDomains": 2, "whenUnsatisfiable": "DoNotSchedule"}
            ]
        },
    ),
    # resources
    Case(
        message="resources.gpuClass:",
        refused={"spec.resources": {"gpusPerNode": 0, "gpuClass": "h100"}},
        accepted={"spec.resources": {"gpusPerNode": 8, "gpuClass": "h100"}, "spec.training.batchSize": 8},
    ),
    Case(
        message="resources.gpuMemory:",
        refused={"spec.resources": {"gpusPerNode": 0, "gpuMemory": "80Gi"}},
        accepted={"spec.resources": {"gpusPerNode": 8, "gpuMemory": "80Gi"}, "spec.training.batchSize": 8},
    ),
    Case(
        message="resources.gpuClass:",
        refused={"spec.resources": {"gpus": 0, "gpuClass": "h100"}},
        accepted={"spec.resources.gpuClass": "h100"},
        base=GENERATE,
    ),
    Case(
        message="resources.gpuMemory:",
        refused={"spec.resources": {"gpus": 0, "gpuMemory": "24Gi"}},
        accepted={"spec.resources.gpuMemory": "24Gi"},
        base=GENERATE,
    ),
    Case(
        message="spec.maxFailedShards:",
        refused={"spec.shards": 8, "spec.maxFailedShards": 8},
        accepted={"spec.shards": 8, "spec.maxFailedShards": 7},
        base=GENERATE,
    ),
    Case(
        message="spec.workspace.accessMode:",
        refused={"spec.workspace.accessMode": "ReadWriteOncePod", "spec.shards": 8, "spec.parallelism": 2},
        accepted={"spec.workspace.accessMode": "ReadWriteOncePod", "spec.shards": 8, "spec.parallelism": 1},
        base=GENERATE,
    ),
    # the Hub
    Case(
        message="hub.tokenSecretRef:",
        refused={"spec.hub": {"repo": "org/out"}},
        accepted={"spec.hub": {"repo": "org/out", "tokenSecretRef": SECRET}},
    ),
    Case(
        message="hub: set repo",
        refused={"spec.hub": {"private": True}},
        accepted={"spec.hub": {"tokenSecretRef": SECRET}},
    ),
    Case(
        message="hub.branch:",
        refused={"spec.hub": {"tokenSecretRef": SECRET, "branch": "v2"}},
        accepted={"spec.hub": {"repo": "org/out", "tokenSecretRef": SECRET, "branch": "v2"}},
    ),
    Case(
        message="hub.private:",
        refused={"spec.hub": {"tokenSecretRef": SECRET, "private": False}},
        accepted={"spec.hub": {"repo": "org/out", "tokenSecretRef": SECRET, "private": False}},
    ),
    Case(
        message="hub.contactSheet: belongs to hub.repo",
        refused=PICTURES | {"spec.hub": {"tokenSecretRef": SECRET, "contactSheet": 9}},
        accepted=PICTURES | {"spec.hub": PUBLISHED | {"contactSheet": 9}},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.columns.tools: are written into the prompt by a chat template;",
        refused={"spec.inputs": named("tools")},
        accepted={"spec.inputs": named("tools"), "spec.text": {"chat": True}},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.rows.tools: are written into the prompt by a chat template;",
        refused={"spec.inputs.rows": [{"prompt": "a"}, {"prompt": "a", "tools": "[]"}]},
        accepted={"spec.inputs.rows": [{"prompt": "a", "tools": "[]"}], "spec.text": {"chat": True}},
        base=GENERATE,
    ),
    # FineTuneJob
    Case(
        message="resources.processesPerNode:",
        refused={"spec.resources": {"gpusPerNode": 1, "processesPerNode": 2}},
        accepted={"spec.resources": {"gpusPerNode": 0, "processesPerNode": 2}},
    ),
    Case(
        message="method.targetModules:",
        refused={"spec.method.targetModules": ["all-linear", "q_proj"]},
        accepted={"spec.method.targetModules": ["q_proj", "v_proj"]},
    ),
    *(
        Case(
            message=message,
            refused=STREAM | refused,
            accepted=STREAM | dict.fromkeys(refused) | accepted,
        )
        for message, refused, accepted in (
            ("dataset.mix: with streaming", {"spec.dataset.mix": MIX, "spec.dataset.files": None}, FROM_FILES),
            ("dataset.format: files of csv, json,", {"spec.dataset.format": "webdataset"}, {}),
            ("dataset.deduplicate: would", {"spec.dataset.deduplicate": "exact"}, {}),
            ("dataset.evalFraction: is a share", {"spec.dataset.evalFraction": 0.1}, {}),
            ("dataset.split: a stream", {"spec.dataset.split": "train[:80%]"}, {"spec.dataset.split": "train[80:]"}),
            ("dataset.split: a stream", {"spec.dataset.split": "train[9:80]"}, {"spec.dataset.split": "train"}),
            (
                "dataset.evalSplit: a stream",
                {"spec.dataset.evalSplit": "train[80%:]"},
                {"spec.dataset.evalSplit": "train[:80]", "spec.dataset.split": "train[80:]"},
            ),
            ("spec.training.maxSteps: a stream", {"spec.training.maxSteps": None}, {"spec.training.maxSteps": 10}),
            ("spec.training.groupByLength: orders", {"spec.training.groupByLength": True}, {}),
            (
                "spec.training.packing: concatenate joins",
                {"spec.training.packing": "concatenate"},
                {"spec.training.packing": "isolated"},
            ),
            ("spec.model.config: the tokenizer", NEW_MODEL, {"spec.model": {"id": "org/model"}}),
            (
                "spec.model.tokenizer: pieces are learnt from all rows",
                {"spec.model": {"id": "org/model", "tokenizer": {"train": {"vocabSize": 400}}}},
                {"spec.model": {"id": "org/model", "addSpecialTokens": ["<|im_end|>"]}},
            ),
            ("spec.training.evalEvery: a stream", HELD_OUT_FILES | {"spec.training.evalEvery": "epoch"}, {}),
            ("spec.training.saveEvery: a stream", {"spec.training.saveEvery": "epoch"}, {}),
        )
    ),
    Case(
        message="dataset.shuffleBuffer: belongs to streaming",
        refused={"spec.dataset.shuffleBuffer": 100},
        accepted=STREAM | {"spec.dataset.shuffleBuffer": 100},
    ),
    *(
        Case(
            message=f"spec.dataset.{field}: applies to causal-lm",
            refused={"spec.task": "text-classification", "spec.dataset.format": "csv"} | given,
            accepted=given,
        )
        for field, given in (
            ("streaming", STREAM),
            ("shuffleBuffer", STREAM | {"spec.dataset.shuffleBuffer": 100}),
        )
    ),
    *(
        Case(
            message="training.groupByLength: packed rows have",
            refused=CAUSAL | {"spec.training": {"packing": packing, "groupByLength": True}},
            accepted=CAUSAL | {"spec.training": accepted},
        )
        for packing in ("isolated", "concatenate")
        for accepted in (
            {"packing": packing},
            {"packing": packing, "groupByLength": False},
            {"packing": "none", "groupByLength": True},
        )
    ),
    Case(
        message="training.warmupSteps: schedule",
        refused={"spec.training": {"schedule": "constant", "warmupSteps": 10}},
        accepted={"spec.training": {"schedule": "constant_with_warmup", "warmupSteps": 10}},
    ),
    Case(
        message="training.warmupSteps: training would end",
        refused={"spec.training": {"maxSteps": 10, "warmupSteps": 10}},
        accepted={"spec.training": {"maxSteps": 10, "warmupSteps": 9}},
    ),
    *(
        Case(
            message="spec.method.bias: bitsandbytes (0.50) rounds the biases of quantised modules to 16 bits",
            refused=method | BIASED,
            accepted=method | {"spec.method.bias": "none"},
        )
        for method in (QLORA, LORA | quantised("int8"))
    ),
    *(
        Case(
            message="spec.method.initLoraWeights: is computed from weights or in their type, which here are of few",
            refused=base | {"spec.method.initLoraWeights": kind},
            accepted=accepted,
        )
        for base in (QLORA, LORA | quantised("int8"))
        for kind, accepted in [
            ("pissa_niter_16", LORA | {"spec.method.initLoraWeights": "pissa_niter_16"}),
            ("orthogonal", base | {"spec.method.initLoraWeights": "gaussian"}),
        ]
    ),
    *(
        Case(
            message="spec.method.initLoraWeights: loftq begins as what 4 bits lose of the weights; use method.type",
            refused=base | LOFTQ,
            accepted=accepted | LOFTQ,
        )
        for base, accepted in ((LORA, QLORA), (LORA | quantised("int8"), LORA | quantised("fp4")))
    ),
    *(
        Case(
            message="spec.method.initLoraWeights: loftq has not been proven with DeepSpeed; use strategy auto or ddp",
            refused=QLORA | LOFTQ | {"spec.strategy": strategy},
            accepted=QLORA | LOFTQ | {"spec.strategy": "ddp"},
        )
        for strategy in ("zero2", "zero2-offload")
    ),
    *(
        Case(
            message="spec.method.initLoraWeights: this task switches the adapter off to compare with the model that",
            refused=task | QLORA | LOFTQ,
            accepted=REWARD | QLORA | LOFTQ,
        )
        for task in (PREFERENCE, GRPO)
    ),
    Case(
        message="spec.method.dora: PEFT (0.21) computes DoRA's magnitudes before loftq changes what they are norms of;",
        refused=QLORA | LOFTQ | {"spec.method.dora": True},
        accepted=QLORA | {"spec.method.dora": True},
    ),
    Case(
        message="spec.method.initLoraWeights: ZeRO-3 and FSDP divide the weights from which adapters begin; use",
        refused={"spec.method.initLoraWeights": "olora", "spec.strategy": "zero3-offload"},
        accepted={"spec.method.initLoraWeights": "olora", "spec.strategy": "zero2-offload"},
    ),
    Case(
        message="spec.method.initLoraWeights: DoRA divides by a norm of what the adapter has become, beside which",
        refused={"spec.method.initLoraWeights": "pissa", "spec.method.dora": True},
        accepted={"spec.method.initLoraWeights": "gaussian", "spec.method.dora": True},
    ),
    Case(
        message="training.warmupRatio: warmupSteps says",
        refused={"spec.training": {"warmupRatio": 0.1, "warmupSteps": 10}},
        accepted={"spec.training": {"warmupRatio": 0.1}},
    ),
    Case(
        message="training.warmupRatio: schedule",
        refused={"spec.training": {"schedule": "constant", "warmupRatio": 0.1}},
        accepted={"spec.training": {"schedule": "constant_with_warmup", "warmupRatio": 0.1}},
    ),
    Case(
        message="training.scheduleOptions.lrEnd:",
        refused={"spec.training": {"schedule": "polynomial", "learningRate": 1e-5, "scheduleOptions": {"lrEnd": 1e-4}}},
        accepted={
            "spec.training": {"schedule": "polynomial", "learningRate": 1e-3, "scheduleOptions": {"lrEnd": 1e-4}}
        },
    ),
    Case(
        message="training.scheduleOptions.numDecaySteps:",
        refused=DECAY | {"spec.training.maxSteps": 10, "spec.training.warmupSteps": 2},
        accepted=DECAY | {"spec.training.maxSteps": 10, "spec.training.warmupSteps": 1},
    ),
    Case(
        message="training.metric:",
        refused={"spec.training.metric": "perplexity"},
        accepted=COMPARED | {"spec.training.metric": "perplexity"},
    ),
    *(
        Case(
            message="training.evalSteps: loadBestModel",
            refused=HELD_OUT | compared,
            accepted=HELD_OUT | compared | {f"spec.training.{field}": value},
        )
        for compared in ({"spec.training.loadBestModel": True}, {"spec.training.earlyStopping": {"patience": 2}})
        for field, value in {"evalSteps": 10, "evalEvery": "epoch"}.items()
    ),
    *(
        Case(
            message=f"spec.training.{field}: no rows are held out",
            refused={f"spec.training.{field}": how_often},
            accepted={f"spec.training.{field}": how_often, f"spec.dataset.{held_out}": value},
        )
        for field, how_often in {"evalSteps": 10, "evalEvery": "epoch"}.items()
        for held_out, value in [
            ("evalSplit", "train[90%:]"),
            ("evalFiles", ["/data/eval.txt"]),
            ("evalFraction", 0.1),
        ]
    ),
    *(
        Case(
            message=f"model.{field}: {cause} from",
            refused={"spec.model": {"config": {"modelType": "llama"}, field: value}, "spec.method": {"type": "full"}},
            accepted={"spec.model": {"config": {"modelType": "llama"}}, "spec.method": {"type": "full"}},
        )
        for field, cause, value in [
            ("resizeEmbeddings", "a model", True),
            ("addSpecialTokens", "the tokenizer of a model", ["<|im_end|>"]),
        ]
    ),
    *(
        Case(
            message="spec.model: TRL (1.16) computes the logits of this task without what an adapter holds of the",
            refused=PREFERENCE | method | change,
            accepted=accepted | change,
        )
        for change in ({"spec.model.addSpecialTokens": ["<|im_end|>"]}, {"spec.model.resizeEmbeddings": True})
        for method, accepted in [(LORA, PREFERENCE | FULL), (QLORA, QLORA)]
    ),
    *(
        Case(
            message="spec.model: PEFT (0.21) reads the rows of new tokens from an embedding that ZeRO-3 divides",
            refused=adapters | change | {"spec.strategy": strategy},
            accepted=accepted | change,
        )
        for change in (
            {"spec.model.addSpecialTokens": ["<|im_end|>"]},
            {"spec.model.resizeEmbeddings": True},
            {"spec.model.tokenizer": {"train": {"vocabSize": 400}}},
        )
        for adapters, strategy, accepted in [
            ({}, "zero3", {"spec.strategy": "zero2"}),
            (LORA, "zero3-offload", FULL | {"spec.strategy": "zero3"}),
        ]
    ),
    *(
        Case(
            message="spec.training.attention: flex_attention, varlen, flash_attention_2, flash_attention_3 need GPUs",
            refused=change | {"spec.resources": {"gpusPerNode": 0}},
            accepted=change,
        )
        for change in (
            {"spec.training": {"attention": "flex_attention"}},
            {"spec.training": {"attention": "varlen", "packing": "isolated"}},
        )
    ),
    Case(
        message="spec.training.attention: varlen is for rows that share maxLength",
        refused={"spec.training": {"attention": "varlen", "packing": "concatenate"}},
        accepted={"spec.training": {"attention": "varlen", "packing": "isolated"}},
    ),
    Case(
        message="spec.training.attention: varlen, flash_attention_2, flash_attention_3 compute in 16 bits",
        refused={"spec.training": {"attention": "flash_attention_2", "precision": "fp32"}},
        accepted={"spec.training": {"attention": "eager", "precision": "fp32"}},
    ),
    *(
        Case(
            message="spec.training.parameterPrecision: applies to full",
            refused=method | {"spec.training": {"parameterPrecision": "bf16"}},
            accepted=FULL | {"spec.training": {"parameterPrecision": "bf16"}},
        )
        for method in (LORA, QLORA)
    ),
    Case(
        message="spec.training.parameterPrecision: DeepSpeed and FSDP keep the weights in fp32",
        refused=FULL | {"spec.strategy": "zero2", "spec.training": {"parameterPrecision": "bf16"}},
        accepted=FULL | {"spec.strategy": "ddp", "spec.training": {"parameterPrecision": "bf16"}},
    ),
    *(
        Case(
            message="spec.training.parameterPrecision: bf16 needs a computation in bf16",
            refused=FULL | {"spec.training": {"parameterPrecision": "bf16", "precision": precision}} | gpus,
            accepted=FULL | {"spec.training": {"parameterPrecision": "bf16", "precision": "bf16"}} | gpus,
        )
        for precision, gpus in (("fp16", {}), ("fp32", {}), ("auto", {"spec.resources": {"gpusPerNode": 0}}))
    ),
    *(
        Case(
            message=f"spec.training.parameterPrecision: {name} works with fp32",
            refused=FULL | {"spec.training": {"parameterPrecision": "bf16", "optimizer": name} | more},
            accepted=FULL | {"spec.training": {"parameterPrecision": "bf16", "optimizer": "adamw_8bit"}},
        )
        for name, more in (
            ("adafactor", {}),
            ("lion_32bit", {}),
            ("lion_8bit", {}),
            ("muon", {}),
            ("schedule_free_adamw", {"schedule": "constant"}),
        )
    ),
    *(
        Case(
            message="spec.training.torchCompile: ZeRO-3 gathers weights inside of blocks",
            refused={"spec.strategy": strategy, "spec.training": {"torchCompile": True}},
            accepted={"spec.strategy": "zero2", "spec.training": {"torchCompile": True}},
        )
        for strategy in ("zero3", "zero3-offload")
    ),
    *(
        Case(message=message, refused=FSDP | refused, accepted=FSDP | accepted)
        for message, refused, accepted in [
            ("spec.strategy: fsdp needs GPUs", ON_TWO_CPUS, {"spec.strategy": "zero3"} | ON_TWO_CPUS),
            ("spec.strategy: fsdp divides the weights over GPUs", {"spec.resources": {"gpusPerNode": 1}}, {}),
            (
                "spec.training.precision: torch (2.13) scales losses of fp16",
                {"spec.training": {"precision": "fp16"}},
                {"spec.training": {"precision": "bf16"}},
            ),
            (
                "spec.training.torchCompile: has not been proven with fsdp",
                {"spec.training": {"torchCompile": True}},
                {"spec.training": {"torchCompile": False}},
            ),
            (
                "spec.method.dora: PEFT (0.21) computes DoRA's magnitudes from whole weights",
                LORA | {"spec.method.dora": True},
                LORA | {"spec.method.dora": False},
            ),
            (
                "spec.model: an embedding that fsdp divides cannot get rows in an adapter",
                LORA | {"spec.model.resizeEmbeddings": True},
                FULL | {"spec.model.resizeEmbeddings": True},
            ),
            ("spec.strategy: preference works with auto, ddp, zero1,", PREFERENCE, {}),
            ("spec.strategy: qlora works with auto, ddp, zero1, zero2, zero2-offload", QLORA, LORA),
            ("spec.strategy: ia3 works with auto, ddp; choose", IA3, LORA),
            ("spec.strategy: muon works with auto, ddp; choose", FULL | {"spec.training": {"optimizer": "muon"}}, FULL),
        ]
    ),
    Case(
        message="spec.training.tf32: needs GPUs",
        refused={"spec.resources": {"gpusPerNode": 0}, "spec.training": {"tf32": True}},
        accepted={"spec.training": {"tf32": True}},
    ),
    Case(
        message="spec.training.precision:",
        refused={"spec.resources": {"gpusPerNode": 0}, "spec.training": {"precision": "fp16"}},
        accepted={"spec.training": {"precision": "fp16"}},
    ),
    Case(
        message="spec.training.batchSize: must be a multiple of microBatchSize",
        refused={"spec.training": {"batchSize": 8, "microBatchSize": 3}},
        accepted={"spec.training": {"batchSize": 9, "microBatchSize": 3}},
    ),
    Case(
        message="spec.training.batchSize: must be a multiple of the number",
        refused={"spec.training": {"batchSize": 6}, "spec.resources": {"nodes": 2, "gpusPerNode": 2}},
        accepted={"spec.training": {"batchSize": 8}, "spec.resources": {"nodes": 2, "gpusPerNode": 2}},
    ),
    # GenerateJob
    Case(
        message="adapters: set exactly one",
        refused={"spec.adapters": [{"id": "org/a", "path": "/a"}]},
        accepted={"spec.adapters": [{"job": "tune"}]},
        base=GENERATE,
    ),
    Case(
        message="adapters.revision:",
        refused={"spec.adapters": [{"path": "/a", "revision": "v1"}]},
        accepted={"spec.adapters": [{"id": "org/a", "revision": "v1"}]},
        base=GENERATE,
    ),
    Case(
        message="inputs: set exactly one",
        refused={"spec.inputs": {}},
        accepted={"spec.inputs": {"dataset": {"files": ["/p.jsonl"]}}},
        base=GENERATE,
    ),
    Case(
        message="sweep: set exactly one of zip and product",
        refused={"spec.inputs": swept({"seed": [1]}, "zip", "product")},
        accepted={"spec.inputs": swept({"seed": [1], "fields": {"style": ["oil", "ink"]}}, "zip")},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.inputs.sweep.{place}.{block}: applies to {task}",
            refused={"spec.task": other, "spec.inputs": swept({block: values}, place)},
            accepted={"spec.task": task, "spec.inputs": swept({block: values}, place)},
            base=GENERATE,
        )
        for place in ("zip", "product")
        for block, task, other, values in SWEPT
    ),
    *(
        Case(
            message=f"spec.inputs.rows.overrides.{block}: applies to {task}",
            refused={"spec.task": other, "spec.inputs.rows": overriding(block, values)},
            accepted={"spec.task": task, "spec.inputs.rows": overriding(block, values)},
            base=GENERATE,
        )
        for block, task, other, values in SWEPT
    ),
    *(
        Case(
            message=f"spec.inputs.columns.settings: names the fields of spec.{block} that columns override:",
            refused={"spec.task": task, "spec.inputs": by_columns(other_field)},
            accepted={"spec.task": task, "spec.inputs": by_columns(own_field)},
            base=GENERATE,
        )
        for block, task, own_field, other_field in (
            ("text", "text-generation", "topK", "chat"),
            ("image", "text-to-image", "steps", "topK"),
        )
    ),
    *(
        Case(
            message=f"spec.inputs.rows.prompt: each row of {task} needs one",
            refused={"spec.task": task, "spec.inputs": {"rows": [{"prompt": "a"}, {"seed": 7}]}},
            accepted={
                "spec.task": task,
                "spec.inputs": {"rows": [{"fields": {"thing": "lute"}}], "template": "a {thing}"},
            },
            base=GENERATE,
        )
        for task in ("text-generation", "text-to-image")
    ),
    Case(
        message="text.perPrompt:",
        refused={"spec.text": {"perPrompt": 2}},
        accepted={"spec.text": {"perPrompt": 2, "temperature": 0.7}},
        base=GENERATE,
    ),
    Case(
        message="spec.precision:",
        refused={"spec.resources": {"gpus": 0}, "spec.precision": "fp16"},
        accepted={"spec.precision": "fp16"},
        base=GENERATE,
    ),
    Case(
        message="adapters.file:",
        refused={"spec.task": "text-to-image", "spec.adapters": [{"job": "tune", "file": "a.safetensors"}]},
        accepted={"spec.task": "text-to-image", "spec.adapters": [{"id": "org/a", "file": "styles/a.safetensors"}]},
        base=GENERATE,
    ),
    Case(
        message="inputs.columns: rows that stand",
        refused={"spec.inputs": {"rows": [{"prompt": "a"}], "columns": {}}},
        accepted={"spec.inputs": {"dataset": {"files": ["/p.jsonl"]}, "columns": {"carry": ["id"]}}},
        base=GENERATE,
    ),
    Case(
        message="inputs.rows: more than 65536 characters",
        refused={"spec.inputs": {"rows": [{"prompt": "é" * 8000}] * 9}},
        accepted={"spec.inputs": {"rows": [{"prompt": "é" * 8000}] * 8}},
        base=GENERATE,
    ),
    Case(
        message="text.topP:",
        refused={"spec.text": {"topP": 0.9}},
        accepted={"spec.text": {"topP": 0.9, "temperature": 0.7}},
        base=GENERATE,
    ),
    Case(
        message="text.topK:",
        refused={"spec.text": {"topK": 40}},
        accepted={"spec.text": {"topK": 40, "temperature": 0.7}},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"image.{name}: applies to",
            refused=PICTURES | {"spec.image": {name: value, "scheduler": scheduler}},
            accepted=PICTURES | {"spec.image": {name: value, "scheduler": "euler"}},
            base=GENERATE,
        )
        for name, value, scheduler in [
            ("sigmas", "karras", "default"),
            ("sigmas", "beta", "ddim"),
            ("timestepSpacing", "trailing", "lcm"),
        ]
    ),
    Case(
        message="refiner: set exactly one of id and path",
        refused=PICTURES | {"spec.image": {"refiner": {"id": "org/r", "path": "/r"}}},
        accepted=PICTURES | {"spec.image": {"refiner": {"id": "org/r"}}},
        base=GENERATE,
    ),
    Case(
        message="refiner.revision: only a model of the Hub",
        refused=PICTURES | {"spec.image": {"refiner": {"path": "/r", "revision": "main"}}},
        accepted=PICTURES | {"spec.image": {"refiner": {"id": "org/r", "revision": "main"}}},
        base=GENERATE,
    ),
    Case(
        message="safety: set exactly one of id and path",
        refused=PICTURES | {"spec.image": {"safety": {"id": "org/s", "path": "/s", "labels": ["nsfw"]}}},
        accepted=PICTURES | {"spec.image": {"safety": {"id": "org/s", "labels": ["nsfw"]}}},
        base=GENERATE,
    ),
    Case(
        message="safety.revision: only a model of the Hub",
        refused=PICTURES | {"spec.image": {"safety": {"path": "/s", "revision": "main", "labels": ["nsfw"]}}},
        accepted=CHANGE | {"spec.image": {"safety": {"id": "org/s", "revision": "main", "labels": ["nsfw"]}}},
        base=GENERATE,
    ),
    *(
        Case(
            message="image.aspectRatio: decides on width and height; remove them, or aspectRatio",
            base=GENERATE,
            refused=PICTURES | {"spec.image": {"aspectRatio": "16:9", name: 512}},
            accepted=PICTURES | {"spec.image": {"aspectRatio": "16:9"}},
        )
        for name in ("width", "height")
    ),
    Case(
        message="image.guidanceRescale: has no effect",
        refused=PICTURES | {"spec.image": {"guidanceRescale": 0.7, "guidance": 1}},
        accepted=PICTURES | {"spec.image": {"guidanceRescale": 0.7}},
        base=GENERATE,
    ),
    Case(
        message="image.guidanceStart: must be below",
        refused=PICTURES | {"spec.image": {"guidanceStart": 0.5, "guidanceEnd": 0.5}},
        accepted=PICTURES | {"spec.image": {"guidanceStart": 0.4, "guidanceEnd": 0.5}},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"image.{name}: has no effect with guidance up to 1",
            refused=PICTURES | {"spec.image": {name: 0.5, "guidance": 1}},
            accepted=PICTURES | {"spec.image": {name: 0.5}},
            base=GENERATE,
        )
        for name in ("guidanceStart", "guidanceEnd")
    ),
    Case(
        message="image.refiner: the steps of two models",
        refused=PICTURES | {"spec.image": {"guidanceEnd": 0.5, "refiner": {"id": "org/r"}}},
        accepted=PICTURES | {"spec.image": {"refiner": {"id": "org/r"}}},
        base=GENERATE,
    ),
    Case(
        message="spec.image.offload: frees memory of a GPU",
        refused=PICTURES | {"spec.image": {"offload": "models"}, "spec.resources": {"gpus": 0}},
        accepted=PICTURES | {"spec.image": {"offload": "auto"}, "spec.resources": {"gpus": 0}},
        base=GENERATE,
    ),
    Case(
        message="text.minP:",
        refused={"spec.text": {"minP": 0.1}},
        accepted={"spec.text": {"minP": 0.1, "temperature": 0.7}},
        base=GENERATE,
    ),
    Case(
        message="text.typicalP:",
        refused={"spec.text": {"typicalP": 0.9}},
        accepted={"spec.text": {"typicalP": 0.9, "temperature": 0.7}},
        base=GENERATE,
    ),
    Case(
        message="text.minNewTokens:",
        refused={"spec.text": {"minNewTokens": 300}},
        accepted={"spec.text": {"minNewTokens": 300, "maxNewTokens": 300}},
        base=GENERATE,
    ),
    Case(
        message="text.numBeams:",
        refused={"spec.text": {"numBeams": 4, "temperature": 0.7}},
        accepted={"spec.text": {"numBeams": 4, "lengthPenalty": 2}},
        base=GENERATE,
    ),
    Case(
        message="text.presencePenalty:",
        refused={"spec.text": {"numBeams": 4, "presencePenalty": 1}},
        accepted={"spec.text": {"presencePenalty": 1}},
        base=GENERATE,
    ),
    Case(
        message="text.frequencyPenalty:",
        refused={"spec.text": {"numBeams": 4, "frequencyPenalty": 1}},
        accepted={"spec.text": {"frequencyPenalty": 1}},
        base=GENERATE,
    ),
    Case(
        message="text.stop:",
        refused={"spec.text": {"numBeams": 4, "stop": ["END"]}},
        accepted={"spec.text": {"stop": ["END", "###"]}},
        base=GENERATE,
    ),
    Case(
        message="text.jsonSchema: has no effect",
        refused={"spec.text": {"numBeams": 4, "jsonSchema": "{}"}},
        accepted={"spec.text": {"jsonSchema": "{}"}},
        base=GENERATE,
    ),
    Case(
        message="text.regex: has no effect",
        refused={"spec.text": {"numBeams": 4, "regex": "a+"}},
        accepted={"spec.text": {"regex": "a+"}},
        base=GENERATE,
    ),
    Case(
        message="text.regex: is one of two",
        refused={"spec.text": {"jsonSchema": "{}", "regex": "a+"}},
        accepted={"spec.text": {"regex": "a+"}},
        base=GENERATE,
    ),
    Case(
        message="text.systemPrompt:",
        refused={"spec.text": {"systemPrompt": "Be brief."}},
        accepted={"spec.text": {"systemPrompt": "Be brief.", "chat": True}},
        base=GENERATE,
    ),
    Case(
        message="text.lengthPenalty:",
        refused={"spec.text": {"lengthPenalty": 2}},
        accepted={"spec.text": {"numBeams": 2, "lengthPenalty": 2}},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.inputs.rows.{role}: each row of {name} needs one",
            refused=NEEDED.get(name, {}) | {"spec.task": name, "spec.inputs.rows": [{}]},
            accepted=NEEDED.get(name, {})
            | {"spec.task": name, "spec.inputs.rows": [dict.fromkeys(GENERATION_TASKS[name].columns, "a lute")]},
            base=GENERATE,
        )
        for name, task in GENERATION_TASKS.items()
        for role in task.columns
        if role != "prompt"
    ),
    Case(
        message="spec.inputs.rows.prompt: applies to text-generation, text-to-image,",
        refused=CLASSIFY | {"spec.inputs.rows": [{"text": "a lute", "prompt": "a lute"}]},
        accepted=CLASSIFY,
        base=GENERATE,
    ),
    Case(
        message="spec.seed: applies to text-generation, text-to-image, summarization,",
        refused=CLASSIFY | {"spec.seed": 0},
        accepted={"spec.seed": 0},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.{block}: applies to {suited['spec.task']}",
            refused={f"spec.{block}": {}},
            accepted=suited | {f"spec.{block}": ZERO_SHOT["spec.zeroShot"] if block == "zeroShot" else {}},
            base=GENERATE,
        )
        for block, suited in BLOCKS.items()
    ),
    *(
        Case(
            message=f"spec.inputs.rows.{role}: applies to {suited['spec.task']}",
            refused={"spec.inputs.rows": [{"prompt": "a lute", role: "a lute"}]},
            accepted=suited,
            base=GENERATE,
        )
        for role, suited in (
            ("text", CLASSIFY),
            ("question", ASKED),
            ("context", ASKED),
            ("image", LOOK),
            ("initImage", CHANGE),
            ("mask", CHANGE),
            ("audio", HEAR),
        )
    ),
    *(
        Case(
            message=f"spec.inputs.columns.{role}: applies to {suited['spec.task']}",
            refused=other | {"spec.inputs": named(role)},
            accepted=suited | {"spec.inputs": named(role)},
            base=GENERATE,
        )
        for role, suited, other in (
            ("prompt", {"spec.task": "text-generation"}, {"spec.task": "fill-mask"}),
            ("text", CLASSIFY, {}),
            ("question", ASKED, {}),
            ("context", ASKED, {}),
            ("image", LOOK, {}),
            ("initImage", CHANGE, {}),
            ("mask", CHANGE, {}),
            ("audio", HEAR, {}),
            ("seed", {"spec.task": "text-generation"}, {"spec.task": "fill-mask"}),
        )
    ),
    Case(
        message="spec.inputs.rows.seed: applies to text-generation, text-to-image, summarization,",
        refused=CLASSIFY | {"spec.inputs.rows": [{"text": "a lute", "seed": 3}]},
        accepted=SUMMARIES | {"spec.inputs.rows": [{"text": "a lute", "seed": 3}]},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.text.{name}: applies to summarization, translation, text2text-generation;",
            refused={"spec.text": {name: "eng_Latn"}},
            accepted=SUMMARIES | {"spec.text": {name: "eng_Latn"}},
            base=GENERATE,
        )
        for name in ("sourceLanguage", "targetLanguage")
    ),
    Case(
        message="spec.inputs.rows.prompt: each row of image-to-image needs one",
        refused=CHANGE | {"spec.inputs.rows": [{"initImage": "/a.png"}]},
        accepted=CHANGE | {"spec.inputs.rows": [{"prompt": "a lute", "initImage": "/a.png"}]},
        base=GENERATE,
    ),
    Case(
        message="spec.image.strength: applies to image-to-image;",
        refused=PICTURES | {"spec.image": {"strength": 0.5}},
        accepted=CHANGE | {"spec.image": {"strength": 0.5}},
        base=GENERATE,
    ),
    Case(
        message="spec.image.refiner: applies to text-to-image;",
        refused=CHANGE | {"spec.image": {"refiner": {"id": "a/b"}}},
        accepted=PICTURES | {"spec.image": {"refiner": {"id": "a/b"}}},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.rows.overrides.image.strength: applies to image-to-image;",
        refused=PICTURES | {"spec.inputs.rows": [{"prompt": "a", "overrides": {"image": {"strength": 0.5}}}]},
        accepted=CHANGE
        | {"spec.inputs.rows": [{"prompt": "a", "initImage": "/a", "overrides": {"image": {"strength": 0.5}}}]},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.inputs.sweep.{way}.image.strength: applies to image-to-image;",
            refused=PICTURES | {"spec.inputs.sweep": {way: {"image": {"strength": [0.5]}}}},
            accepted=CHANGE | {"spec.inputs.sweep": {way: {"image": {"strength": [0.5]}}}},
            base=GENERATE,
        )
        for way in ("zip", "product")
    ),
    Case(
        message="spec.inputs.rows.overrides.text.systemPrompt: applies to text-generation;",
        refused=SUMMARIES | {"spec.inputs.rows": [{"text": "a", "overrides": {"text": {"systemPrompt": "b"}}}]},
        accepted={"spec.inputs.rows": [{"prompt": "a", "overrides": {"text": {"systemPrompt": "b"}}}]},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.inputs.sweep.{way}.text.systemPrompt: applies to text-generation;",
            refused=SUMMARIES | {"spec.inputs.sweep": {way: {"text": {"systemPrompt": ["b"]}}}},
            accepted={"spec.inputs.sweep": {way: {"text": {"systemPrompt": ["b"]}}}},
            base=GENERATE,
        )
        for way in ("zip", "product")
    ),
    *(
        Case(
            message=f"spec.inputs.columns.settings: {block} is the same for all rows",
            refused={"spec.task": suited["spec.task"], "spec.inputs": by_columns("topK")},
            accepted=suited,
            base=GENERATE,
        )
        for block, suited in BLOCKS.items()
    ),
    Case(
        message="spec.inputs.template: applies to text-generation, text-to-image,",
        refused=CLASSIFY | {"spec.inputs.template": "a {thing}"},
        accepted={"spec.inputs.template": "a {prompt}"},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.rows.fields: applies to text-generation, text-to-image,",
        refused=CLASSIFY | {"spec.inputs.rows": [{"text": "a lute", "fields": {"a": "b"}}]},
        accepted={"spec.inputs": {"rows": [{"fields": {"a": "b"}}], "template": "a {a}"}},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.inputs.sweep.{way}.{name}: applies to text-generation,",
            refused=CLASSIFY | {"spec.inputs.sweep": {way: {name: value}}},
            accepted={"spec.inputs.sweep": {way: {name: value}}},
            base=GENERATE,
        )
        for way in ("zip", "product")
        for name, value in (("seed", [1, 2]),)
    ),
    Case(
        message="spec.inputs.truncate: applies to text-classification,",
        refused={"spec.inputs.truncate": True},
        accepted=CLASSIFY | {"spec.inputs.truncate": True},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.text.{name}: applies to text-generation;",
            refused=SUMMARIES | {"spec.text": {name: "{}"}},
            accepted={"spec.text": {name: "{}", "chat": True}},
            base=GENERATE,
        )
        for name in ("jsonSchema", "regex", "systemPrompt")
    ),
    Case(
        message="spec.text.chat: applies to text-generation;",
        refused=SUMMARIES | {"spec.text": {"chat": True}},
        accepted={"spec.text": {"chat": True}},
        base=GENERATE,
    ),
    Case(
        message="spec.model.quantization: applies to text-classification,",
        refused=PICTURES | quantised("nf4"),
        accepted=SUMMARIES | quantised("nf4"),
        base=GENERATE,
    ),
    Case(
        message="spec.text.offload: applies to text-generation;",
        refused=SUMMARIES | {"spec.text": {"offload": "layers"}},
        accepted={"spec.text": {"offload": "layers"}},
        base=GENERATE,
    ),
    Case(
        message="spec.text.offload: frees memory of a GPU",
        refused={"spec.text": {"offload": "layers"}, "spec.resources": {"gpus": 0}},
        accepted={"spec.text": {"offload": "none"}, "spec.resources": {"gpus": 0}},
        base=GENERATE,
    ),
    Case(
        message="spec.text.offload: packed weights of bitsandbytes",
        refused=quantised("int8") | {"spec.text": {"offload": "layers"}},
        accepted=quantised("int8") | {"spec.text": {"offload": "none"}},
        base=GENERATE,
    ),
    Case(
        message="spec.adapters: are merged into whole weights",
        refused=quantised("nf4") | {"spec.adapters": [{"job": "tune"}]},
        accepted=quantised("nf4") | {"spec.model.job": "tune", "spec.model.id": None},
        base=GENERATE,
    ),
    Case(
        message="spec.text.prefix: applies to summarization, translation, text2text-generation;",
        refused={"spec.text": {"prefix": "summarize: "}},
        accepted=SUMMARIES | {"spec.text": {"prefix": "summarize: "}},
        base=GENERATE,
    ),
    Case(
        message="entities.stride:",
        refused=ENTITIES | {"spec.entities": {"stride": 16, "aggregation": "none"}},
        accepted=ENTITIES | {"spec.entities": {"stride": 16}},
        base=GENERATE,
    ),
    *(
        Case(
            message="spec.inputs.rows.reference: applies to text-classification, token-classification,",
            refused={"spec.task": task, "spec.inputs.rows": [row | {"reference": "b"}]},
            accepted=accepted,
            base=GENERATE,
        )
        for task, row, accepted in (
            ("text-to-image", {"prompt": "a"}, {"spec.inputs.rows": [{"prompt": "a", "reference": "b"}]}),
            ("fill-mask", {"text": "a"}, ASKED | {"spec.inputs.rows": [{**QUESTION, "reference": "b"}]}),
        )
    ),
    Case(
        message="spec.inputs.columns.reference: applies to text-classification, token-classification,",
        refused={"spec.task": "feature-extraction", "spec.inputs": REFERENCES},
        accepted=SUMMARIES | {"spec.inputs": REFERENCES},
        base=GENERATE,
    ),
    *(
        Case(
            message=f"spec.inputs.{place}.reference: single tokens (entities.aggregation: none) are no entities",
            refused=ENTITIES | {"spec.inputs": inputs, "spec.entities": {"aggregation": "none"}},
            accepted=ENTITIES | {"spec.inputs": inputs},
            base=GENERATE,
        )
        for place, inputs in (("columns", REFERENCES), ("rows", {"rows": [{"text": "a lute", "reference": "O O"}]}))
    ),
    Case(
        message="inputs: set exactly one of rows, dataset and job",
        refused={"spec.inputs.job": "other", "spec.inputs.columns": {"prompt": "text"}},
        accepted={"spec.inputs": OTHER},
        base=GENERATE,
    ),
    Case(
        message="inputs.columns: says which column of the outputs",
        refused={"spec.inputs": {"job": "other"}},
        accepted={"spec.inputs": OTHER},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.job: is this job itself",
        refused={"spec.inputs": OTHER | {"job": "sound"}},
        accepted={"spec.inputs": OTHER},
        base=GENERATE,
    ),
    *(
        Case(
            message="inputs.form: requests (openai-batch) are rows of inputs.dataset",
            refused={"spec.inputs": BATCH | more},
            accepted={"spec.inputs": BATCH},
            base=GENERATE,
        )
        for more in ({"columns": {"prompt": "a"}}, {"template": "{a}"}, {"sweep": {"zip": {"seed": [1]}}})
    ),
    Case(
        message="inputs.form: requests (openai-batch) are rows of inputs.dataset",
        refused={"spec.inputs.form": "openai-batch"},
        accepted={"spec.inputs.form": "columns"},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.form: applies to text-generation;",
        refused=SUMMARIES | {"spec.inputs": BATCH},
        accepted={"spec.inputs": BATCH},
        base=GENERATE,
    ),
    *(
        Case(
            message="spec.outputs.format: openai-batch is a form of text-generation, with inputs.form: openai-batch;",
            refused=change | {"spec.outputs": {"format": "openai-batch"}},
            accepted={"spec.inputs": BATCH, "spec.outputs": {"format": "openai-batch"}},
            base=GENERATE,
        )
        for change in ({}, {"spec.inputs.form": "columns"}, SUMMARIES)
    ),
    Case(
        message="spec.outputs.format: webdataset is a form of text-to-image, image-to-image;",
        refused={"spec.outputs": {"format": "webdataset"}},
        accepted=PICTURES | {"spec.outputs": {"format": "webdataset"}},
        base=GENERATE,
    ),
    Case(
        message="answers.noneThreshold:",
        refused=ASKED | {"spec.answers": {"noneThreshold": 1.5}},
        accepted=ASKED | {"spec.answers": {"noneThreshold": 1.5, "allowNone": True}},
        base=GENERATE,
    ),
    Case(
        message="spec.zeroShot.labels: zero-shot-classification needs the labels",
        refused=ZERO_SHOT | {"spec.zeroShot": {}},
        accepted=ZERO_SHOT,
        base=GENERATE,
    ),
    Case(
        message="zeroShot.hypothesis: has no {}",
        refused=ZERO_SHOT | {"spec.zeroShot": {"labels": ["a"], "hypothesis": "It is so."}},
        accepted=ZERO_SHOT,
        base=GENERATE,
    ),
    Case(
        message="zeroShot.threshold:",
        refused=ZERO_SHOT | {"spec.zeroShot": {"labels": ["a"], "threshold": 0.7}},
        accepted=ZERO_SHOT | {"spec.zeroShot": {"labels": ["a"], "threshold": 0.7, "multiLabel": True}},
        base=GENERATE,
    ),
    Case(
        message="spec.inputs.rows.negativePrompt: has no effect",
        refused={"spec.task": "text-to-image", "spec.inputs.rows": NEGATIVE, "spec.image": {"guidance": 1}},
        accepted={"spec.task": "text-to-image", "spec.inputs.rows": NEGATIVE},
        base=GENERATE,
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


def tracked(keys: dict[str, str], name: str = "mlflow") -> Change:
    return {"spec.tracking": [MLFLOW | {"secretRef": {"name": name, "keys": keys}}]}


def toleration(**fields: str) -> Change:
    return {"spec.scheduling.tolerations": [{"key": "gpu"} | fields]}


BYTES = (
    ("0", "0.0Gi", "-1Gi", "100m", "0e3", "1e", "Gi", "1.2.3", "many"),
    ("1Gi", "0.5Ti", ".5G", "1e9", "+1Ei", "1000000000"),
)
CORES = (("0", "0m", "-1", "1Gi"), ("1", "0.5", "500m", "10", "1500000u"))
GPU_BYTES = (("80", "80gb", "0Gi", "512Mi", "12345Gi", "100Ki", "-1Gi"), ("80Gi", "79.5Gi", "40G", "81920Mi", "1.5Ti"))
KEYS = (("", "a b", "-a", "a/b/c", "/a", "Example.com/gpu"), ("gpu", "example.com/GPU_type"))
VALUES = (("a b", "-a", "a/b"), ("", "h100", "A_100.80"))
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
PATHS = (
    (
        "/proc/self/environ",
        "/proc",
        "//proc/1/environ",
        "/var/run/secrets/token",
        "/run/luthier/run.json",
        "/etc/passwd",
        "/dev/stdin",
        "/sys/x",
    ),
    ("/data/train.txt", "data/proc/x", "/processed/x", "/var/data/x", "/data/etc/x"),
)


def mixed(source: dict[str, Any]) -> Change:
    """A mix whose first source is this one."""
    return {"spec.dataset": {"mix": {"sources": [source, {"id": "org/a"}]}}}


WRITTEN: list[Written] = [
    # field, how to set it, what is refused, what passes
    Written("spec.model.id", lambda t: {"spec.model.id": t}, *HUB_NAMES),
    Written(
        field="spec.model.job",
        change=lambda t: {"spec.model": {"job": t}},
        refused=("Base", "a.b", "a-"),
        accepted=("base", "b-2"),
    ),
    Written(
        field="spec.model.config.modelType",
        change=lambda t: {"spec.model": {"config": {"modelType": t}}, "spec.method.type": "full"},
        refused=("", "Llama"),
        accepted=("llama", "qwen3_moe"),
    ),
    Written(
        field="spec.method.initLoraWeights",
        change=lambda t: {"spec.method.initLoraWeights": t},
        refused=("", "eva", "pissa_niter_", "pissa_niter_100"),
        accepted=("gaussian", "pissa", "pissa_niter_16"),
    ),
    Written(
        field="spec.speech.language",
        change=lambda t: SPEECH | {"spec.speech.language": t},
        refused=("", "Eng", "EN", "e"),
        accepted=("en", "yue"),
    ),
    Written(
        field="spec.transcribe.language",
        change=lambda t: HEAR | {"spec.transcribe": {"language": t}},
        refused=("", "Eng", "EN", "e"),
        accepted=("en", "yue"),
        base=GENERATE,
    ),
    Written("spec.model.path", lambda t: {"spec.model": {"path": t}}, *PATHS),
    Written("spec.adapters[].path", lambda t: {"spec.adapters": [{"path": t}]}, *PATHS, GENERATE),
    Written("spec.dataset.mix.sources[].files[]", lambda t: mixed({"files": [t]}), *PATHS),
    Written("spec.dataset.mix.sources[].id", lambda t: mixed({"id": t}), *HUB_NAMES),
    Written("spec.dataset.mix.sources[].encoding", lambda t: mixed({"files": ["/x"], "encoding": t}), *ENCODINGS),
    Written("spec.dataset.mix.sources[].revision", lambda t: mixed({"id": "org/data", "revision": t}), *REFS),
    Written("spec.grpo.rewards[].model.id", lambda t: rewarded({"type": "model", "model": {"id": t}}), *HUB_NAMES),
    Written("spec.grpo.rewards[].model.path", lambda t: rewarded({"type": "model", "model": {"path": t}}), *PATHS),
    Written(
        "spec.grpo.rewards[].model.revision",
        lambda t: rewarded({"type": "model", "model": {"id": "org/rm", "revision": t}}),
        *REFS,
    ),
    Written("spec.grpo.rewards[].file", lambda t: rewarded({"type": "python", "file": t}), *PATHS),
    Written(
        field="spec.grpo.rewards[].function",
        change=lambda t: rewarded(PYTHON | {"function": t}),
        refused=("a.b", "1a", "a b"),
        accepted=("reward", "_graded2"),
    ),
    Written(
        field="spec.grpo.rewards[].model.job",
        change=lambda t: rewarded({"type": "model", "model": {"job": t}}),
        refused=("Base", "a.b", "a-"),
        accepted=("base", "b-2"),
    ),
    Written("spec.dataset.files[]", lambda t: {"spec.dataset": {"files": [t]}}, *PATHS),
    Written("spec.dataset.evalFiles[]", lambda t: {"spec.dataset": {"files": ["/x"], "evalFiles": [t]}}, *PATHS),
    Written("spec.dataset.chatTemplate.file", lambda t: {"spec.dataset.chatTemplate": {"file": t}}, *PATHS),
    Written("spec.inputs.dataset.files[]", lambda t: {"spec.inputs": {"dataset": {"files": [t]}}}, *PATHS, GENERATE),
    Written("spec.dataset.id", lambda t: {"spec.dataset": {"id": t}}, *HUB_NAMES),
    Written("spec.dataset.encoding", lambda t: {"spec.dataset": {"files": ["/x"], "encoding": t}}, *ENCODINGS),
    Written(
        "spec.inputs.dataset.encoding",
        lambda t: {"spec.inputs": {"dataset": {"files": ["/x"], "encoding": t}}},
        *ENCODINGS,
        GENERATE,
    ),
    Written(
        "spec.inputs.job",
        lambda t: {"spec.inputs": OTHER | {"job": t}},
        ("Other", "other_job", "-a", "a-", "a.b", "a/b"),
        ("other", "other-2"),
        GENERATE,
    ),
    Written("spec.inputs.dataset.id", lambda t: {"spec.inputs": {"dataset": {"id": t}}}, *HUB_NAMES, GENERATE),
    *(
        Written(
            f"spec.image.{block}.{name}",
            lambda t, name=name, block=block, more=more: {
                "spec.task": "text-to-image",
                "spec.image": {block: {name: t} | ({"id": "org/r"} if name == "revision" else {}) | more},
            },
            *texts,
            GENERATE,
        )
        for name, texts in (("id", HUB_NAMES), ("path", PATHS), ("revision", REFS))
        for block, more in (("refiner", {}), ("safety", {"labels": ["nsfw"]}))
    ),
    Written("spec.adapters[].id", lambda t: {"spec.adapters": [{"id": t}]}, *HUB_NAMES, GENERATE),
    Written(
        field="spec.adapters[].job",
        change=lambda t: {"spec.adapters": [{"job": t}]},
        refused=("Base", "a.b", "a-"),
        accepted=("base", "b-2"),
        base=GENERATE,
    ),
    Written(
        field="spec.adapters[].file",
        change=lambda t: {"spec.task": "text-to-image", "spec.adapters": [{"id": "org/a", "file": t}]},
        refused=(
            "",
            "a.bin",
            ".safetensors/a",
            "/a.safetensors",
            "../a.safetensors",
            "a/./b.safetensors",
            "a//b.safetensors",
        ),
        accepted=("a.safetensors", "styles/Pixel Art.safetensors", "a..b.safetensors"),
        base=GENERATE,
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
    Written(
        "spec.hub.branch", lambda t: {"spec.hub": {"repo": "org/out", "branch": t, "tokenSecretRef": SECRET}}, *REFS
    ),
    Written("spec.hub.repo", lambda t: {"spec.hub": {"repo": t, "tokenSecretRef": SECRET}}, *HUB_NAMES),
    Written("spec.hub.tokenSecretRef.name", lambda t: {"spec.hub": {"tokenSecretRef": {"name": t}}}, *NAMES),
    Written(
        field="spec.hub.tokenSecretRef.key",
        change=lambda t: {"spec.hub": {"tokenSecretRef": {"name": "hf", "key": t}}},
        refused=("a/b", "a b", ".", "..", "..a"),
        accepted=("HF_TOKEN", ".token", "a.b"),
    ),
    Written(
        field="spec.tracking[].secretRef.name",
        change=lambda t: tracked({"token": "token"}, name=t),
        refused=NAMES[0],
        accepted=NAMES[1],
    ),
    Written(
        field="spec.tracking[].secretRef.keys.token",
        change=lambda t: tracked({"token": t}),
        refused=("a/b", ".."),
        accepted=("MLFLOW_TRACKING_TOKEN", "token"),
    ),
    Written(
        field="spec.tracking[].secretRef.keys.username",
        change=lambda t: tracked({"username": t, "password": "p"}),
        refused=("a/b",),
        accepted=("user",),
    ),
    Written(
        field="spec.tracking[].secretRef.keys.apiKey",
        change=lambda t: {"spec.tracking": [{"type": "wandb", "secretRef": {"name": "w", "keys": {"apiKey": t}}}]},
        refused=("a/b",),
        accepted=("key",),
    ),
    Written(
        field="spec.tracking[].secretRef.keys.writeToken",
        change=lambda t: {"spec.tracking": [TRACKIO | {"secretRef": {"name": "w", "keys": {"writeToken": t}}}]},
        refused=("a/b",),
        accepted=("token",),
    ),
    Written(
        field="spec.tracking[].secretRef.keys.password",
        change=lambda t: tracked({"username": "u", "password": t}),
        refused=("a/b",),
        accepted=("password",),
    ),
    *(
        Written(
            field=f"spec.stores[].secretRef.keys.{key}",
            change=lambda t, kind=kind, key=key, keys=keys: {
                "spec.stores": [{"type": kind, "secretRef": {"name": "s", "keys": dict.fromkeys(keys, "k") | {key: t}}}]
            },
            refused=("a/b",),
            accepted=("key",),
        )
        for kind, *keys in (
            ("s3", "accessKeyId", "secretAccessKey", "sessionToken"),
            ("gs", "serviceAccountKey"),
            ("az", "accountKey"),
            ("az", "sasToken"),
        )
        for key in keys
    ),
    Written(
        field="spec.stores[].secretRef.name",
        change=lambda t: {"spec.stores": [kept("az", "sasToken", name=t)]},
        refused=NAMES[0],
        accepted=NAMES[1],
    ),
    Written(
        field="spec.stores[].endpoint",
        change=lambda t: {"spec.stores": [{"type": "s3", "endpoint": t}]},
        refused=("minio:9000", "s3://bucket", "http://me:secret@minio", "http://minio?a=b"),
        accepted=("http://minio.storage.svc:9000", "https://s3.example.org/"),
    ),
    Written(
        field="spec.stores[].region",
        change=lambda t: {"spec.stores": [{"type": "s3", "region": t}]},
        refused=("", "EU", "eu central"),
        accepted=("eu-central-1",),
    ),
    Written(
        field="spec.stores[].account",
        change=lambda t: {"spec.stores": [{"type": "az", "account": t}]},
        refused=("ab", "Lutes", "lutes.blob"),
        accepted=("lutes01",),
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
        field="spec.volumes[].mountPath",
        change=lambda t: volume(claimName="a", mountPath=t),
        refused=("data", "/", "//tmp", "/./tmp", "/data/../tmp", "/data/..", "/data/", "/a:b", "/ü"),
        accepted=("/data", "/models/.cache", "/mnt/a..b", "/data/v1.2_3-4"),
    ),
    Written(
        field="spec.tracking[].url",
        change=lambda t: {"spec.tracking": [{"type": "mlflow", "url": t}]},
        refused=(
            *("mlflow:5000", "http://", "http://me:secret@mlflow", "sqlite:///a.db", "http://a b"),
            *("http://trackio:7860?write_token=secret", "http://trackio:7860/?write_token=secret"),
        ),
        accepted=("http://mlflow.mlops.svc:5000", "https://me-trackio.hf.space", "https://mlflow.example.org/team-a"),
    ),
    Written("spec.scheduling.queueName", lambda t: {"spec.scheduling.queueName": t}, *NAMES),
    Written("spec.scheduling.priorityClassName", lambda t: {"spec.scheduling.priorityClassName": t}, *NAMES),
    Written(
        field="spec.scheduling.nodeSelector",
        change=lambda t: {"spec.scheduling.nodeSelector": {t: "x"}},
        refused=("", "a b", "-a", "a/b/c", "/a", "Example.com/gpu", "a" * 64),
        accepted=("gpu", "example.com/GPU_type", "a" * 63),
    ),
    Written(
        field="spec.scheduling.nodeSelector{}",
        change=lambda t: {"spec.scheduling.nodeSelector": {"gpu": t}},
        refused=("a b", "-a", "a/b"),
        accepted=("", "h100", "A_100.80"),
    ),
    Written(
        field="spec.scheduling.tolerations[].key",
        change=lambda t: toleration(key=t),
        refused=("", "a b", "/a"),
        accepted=("gpu", "nvidia.com/gpu"),
    ),
    Written(
        field="spec.scheduling.tolerations[].value",
        change=lambda t: toleration(value=t),
        refused=("a b", "a/b"),
        accepted=("", "h100"),
    ),
    Written("spec.scheduling.schedulerName", lambda t: {"spec.scheduling.schedulerName": t}, *NAMES),
    Written("spec.scheduling.runtimeClassName", lambda t: {"spec.scheduling.runtimeClassName": t}, *NAMES),
    Written("spec.scheduling.labels", lambda t: {"spec.scheduling.labels": {t: "x"}}, *KEYS),
    Written("spec.scheduling.labels{}", lambda t: {"spec.scheduling.labels": {"team": t}}, *VALUES),
    Written("spec.scheduling.annotations", lambda t: {"spec.scheduling.annotations": {t: "any text"}}, *KEYS),
    Written(
        "spec.scheduling.topologySpreadConstraints[].topologyKey",
        lambda t: {"spec.scheduling.topologySpreadConstraints": [{"topologyKey": t}]},
        *KEYS,
    ),
    *(
        written
        for path, change in (
            (f"{NODES}.{REQUIRED}.nodeSelectorTerms[]", node_expression),
            (f"{NODES}.{PREFERRED}[].preference", preferred_node),
        )
        for written in (
            Written(f"{path}.matchExpressions[].key", lambda t, change=change: change(key=t, operator="Exists"), *KEYS),
            Written(
                f"{path}.matchExpressions[].values[]",
                lambda t, change=change: change(operator="In", values=[t]),
                *VALUES,
            ),
        )
    ),
    *(
        written
        for kind in ("podAffinity", "podAntiAffinity")
        for path, change in (
            (f"spec.scheduling.affinity.{kind}.{REQUIRED}[]", partial(pod_term, kind)),
            (f"spec.scheduling.affinity.{kind}.{PREFERRED}[].podAffinityTerm", partial(preferred_pods, kind)),
        )
        for written in (
            Written(f"{path}.topologyKey", lambda t, change=change: change(key=t), *KEYS),
            Written(f"{path}.labelSelector.matchLabels", lambda t, change=change: change(matchLabels={t: "x"}), *KEYS),
            Written(
                f"{path}.labelSelector.matchLabels{{}}",
                lambda t, change=change: change(matchLabels={"app": t}),
                *VALUES,
            ),
            Written(
                f"{path}.labelSelector.matchExpressions[].key",
                lambda t, change=change: change(matchExpressions=[{"key": t, "operator": "Exists"}]),
                *KEYS,
            ),
            Written(
                f"{path}.labelSelector.matchExpressions[].values[]",
                lambda t, change=change: change(matchExpressions=[{"key": "app", "operator": "In", "values": [t]}]),
                *VALUES,
            ),
        )
    ),
    *(
        Written(f"spec.{block}.{field}", lambda t, block=block, field=field: {f"spec.{block}.{field}": t}, *texts)
        for block in ("prepare", "publish")
        for field, texts in (("cpu", CORES), ("memory", BYTES), ("ephemeralStorage", BYTES))
    ),
    *(
        written
        for base in (FINE_TUNE, GENERATE)
        for written in (
            Written("spec.resources.gpuMemory", lambda t: {"spec.resources.gpuMemory": t}, *GPU_BYTES, base),
            Written("spec.resources.ephemeralStorage", lambda t: {"spec.resources.ephemeralStorage": t}, *BYTES, base),
            Written("spec.resources.gpuClass", lambda t: {"spec.resources.gpuClass": t}, *NAMES, base),
        )
    ),
]


def specified(**spec: Any) -> Document:
    """A FineTuneJob with these fields of its spec as they are, also those that say null."""
    return {**FINE_TUNE, "spec": FINE_TUNE["spec"] | spec}


@dataclass(frozen=True)
class StrangeCase:
    name: str
    document: Document
    message: str | None  # None: accepted


# Where a reader that means well and the API server could disagree.
STRANGE = [
    StrangeCase(
        name="a name of Python's",
        document=specified(resources={"gpus_per_node": 0}),
        message="spec.resources.gpus_per_node: unknown field. Did you mean 'gpusPerNode'?",
    ),
    StrangeCase(
        name="a text for a number",
        document=specified(training={"batchSize": "16"}),
        message="spec.training.batchSize: input should be a valid integer (it is '16')",
    ),
    StrangeCase(
        name="a text for yes or no",
        document=specified(training={"gradientCheckpointing": "yes"}),
        message="spec.training.gradientCheckpointing: input should be a valid boolean (it is 'yes')",
    ),
    StrangeCase(
        name="yes for a number",
        document=specified(training={"epochs": True}),
        message="spec.training.epochs: input should be a valid number (it is True)",
    ),
    StrangeCase(
        name="a part of a number",
        document=specified(training={"maxLength": 64.5}),
        message="spec.training.maxLength: input should be a valid integer (it is 64.5)",
    ),
    StrangeCase(
        name="a whole number for a quantity",
        document=specified(resources={"cpu": 16, "memory": 64_000_000_000}),
        message=None,
    ),
    StrangeCase(
        name="a whole number with a point for a quantity",
        document=specified(resources={"cpu": 16.0}),
        message=None,
    ),
    StrangeCase(
        name="no quantity above zero",
        document=specified(resources={"cpu": 0}),
        message="spec.resources.cpu: must be a number of cores above zero, such as 4, \"0.5\" or 500m (it is '0')",
    ),
    StrangeCase(
        name="a fraction for a quantity",
        document=specified(resources={"cpu": 0.5}),
        message='spec.resources.cpu: must be a number of cores above zero, such as 4, "0.5" or 500m (it is 0.5)',
    ),
    StrangeCase(
        name="yes for a quantity",
        document=specified(resources={"cpu": True}),
        message='spec.resources.cpu: must be a number of cores above zero, such as 4, "0.5" or 500m (it is True)',
    ),
    StrangeCase(
        name="a number for a text",
        document=specified(dataset={"id": "org/data", "name": 16}),
        message="spec.dataset.name: input should be a valid string (it is 16)",
    ),
    StrangeCase(
        name="two volumes at one place",
        document=specified(volumes=[{"claimName": name, "mountPath": "/data"} for name in "ab"]),
        message="spec.volumes: two items have the mountPath '/data'; each must be there once",
    ),
    StrangeCase(
        name="a tracker twice",
        document=specified(tracking=[{"type": "tensorboard"}] * 2),
        message="spec.tracking: two items have the type 'tensorboard'; each must be there once",
    ),
    StrangeCase(
        name="a volume below another",
        document=changed(FINE_TUNE, mounted("/data", "/models", "/data/more")),
        message=None,
    ),
    StrangeCase(
        name="a module twice",
        document=specified(method={"targetModules": ["q_proj", "v_proj", "q_proj"]}),
        message="spec.method.targetModules: two items have the value 'q_proj'; each must be there once",
    ),
    StrangeCase(
        name="null for what must be there",
        document=specified(model=None),
        message="spec.model: required",
    ),
    StrangeCase(
        name="null for what does not exist",
        document=specified(zebra=None),
        message="spec.zebra: unknown field",
    ),
    StrangeCase(
        name="null in a list",
        document=specified(method={"targetModules": [None]}),
        message="spec.method.targetModules[0]: input should be a valid string (it is None)",
    ),
    StrangeCase(
        name="null where there is a default",
        document=specified(training=None, workspace=None),
        message=None,
    ),
    StrangeCase(
        name="null where there is none",
        document=specified(hub=None),
        message=None,
    ),
    StrangeCase(
        name="null below a default",
        document=specified(training={"batchSize": None, "epochs": 2}),
        message=None,
    ),
    StrangeCase(
        name="null for a label",
        document=specified(scheduling={"nodeSelector": {"gpu": None}}),
        message=None,
    ),
    StrangeCase(
        name="a whole number with a point",
        document=specified(training={"maxLength": 64.0}),
        message=None,
    ),
    StrangeCase(
        name="a whole number for a fraction",
        document=specified(training={"learningRate": 1}),
        message=None,
    ),
    StrangeCase(
        name="a status",
        document=FINE_TUNE | {"status": {"state": "Running"}},
        message=None,
    ),
]

EXISTING: dict[str, Document] = {
    base["kind"]: changed(
        base,
        {"metadata.name": "fixed", "spec.suspend": True, "spec.hub": {"tokenSecretRef": SECRET}}
        | more
        | {"spec.workspace.claimName": "mine"},
    )
    for base, more in ((FINE_TUNE, {}), (GENERATE, {"spec.shards": 2}))
}
"""A job of each kind that is there already; suspended, so that no operator begins with it."""

# What may change once a job exists, and what may not: field → another value than the one in EXISTING.
STEERING: Change = {
    "spec.suspend": False,
    "spec.activeDeadlineSeconds": 60,
    "spec.ttlSecondsAfterFinished": 60,
    "spec.planOnly": True,
    "spec.hub": {"repo": "org/out", "tokenSecretRef": SECRET},
    "spec.retry": 1,
}
LIVE: dict[str, Change] = {
    "FineTuneJob": STEERING | {"spec.restarts": {"max": 7}},
    "GenerateJob": STEERING | {"spec.retriesPerShard": 7, "spec.parallelism": 2, "spec.maxFailedShards": 1},
}


PAUSED: Change = {
    "spec.resources.cpu": 4,
    "spec.resources.memory": "8Gi",
    "spec.volumes": [{"claimName": "a", "mountPath": "/data"}],
    "spec.resources.gpuClass": "h100",
    "spec.resources.gpuMemory": "40Gi",
    "spec.resources.ephemeralStorage": "50Gi",
    "spec.prepare": {"memory": "8Gi"},
    "spec.publish": {"memory": "8Gi"},
    "spec.stores": [{"type": "s3"}],
    "spec.workspace.ownership": "Change",
    "spec.scheduling": {"queueName": "team-a"},
}
WHILE_STOPPED: dict[str, Change] = {
    "FineTuneJob": PAUSED
    | {
        "spec.strategy": "zero2",
        "spec.training.microBatchSize": 1,
        "spec.training.gradientCheckpointing": True,
        "spec.training.attention": "eager",
        "spec.training.torchCompile": True,
        "spec.training.logSteps": 7,
        "spec.training.saveEvery": "epoch",
        "spec.training.saveSteps": 7,
        "spec.training.keepCheckpoints": 7,
        "spec.tracking": [{"type": "tensorboard"}],
    },
    "GenerateJob": PAUSED | {"spec.maxFailedRows": 7},
}
"""What may change only while no pods work with it: path → another value than the one in EXISTING."""


@dataclass(frozen=True)
class FixedCase:
    """A field that may not change once the job exists, and another value for it."""

    field: str
    base: Document
    change: Change
    excepted: str = ""
    """The fields of the block that may change, as the message has them."""


FIXED = [
    FixedCase(
        field="task",
        base=FINE_TUNE,
        change={"spec.task": "text-classification"},
    ),
    FixedCase(
        field="model",
        base=FINE_TUNE,
        change={"spec.model.revision": "v2"},
    ),
    FixedCase(
        field="dataset",
        base=FINE_TUNE,
        change={"spec.dataset.split": "test"},
    ),
    FixedCase(
        field="method",
        base=FINE_TUNE,
        change={"spec.method.rank": 4},
    ),
    FixedCase(
        field="training",
        base=FINE_TUNE,
        change={"spec.training.epochs": 7},
        excepted=(
            "microBatchSize, attention, torchCompile, gradientCheckpointing, logSteps, saveEvery, saveSteps,"
            " keepCheckpoints"
        ),
    ),
    FixedCase(
        field="preference",
        base=FINE_TUNE,
        change={"spec.preference": {"beta": 0.2}},
    ),
    FixedCase(
        field="reward",
        base=FINE_TUNE,
        change={"spec.reward": {"centerRewardsCoefficient": 0.01}},
    ),
    FixedCase(
        field="grpo",
        base=FINE_TUNE,
        change={"spec.grpo": {"rewards": [MATCHED]}},
    ),
    *(
        FixedCase(
            field=field,
            base=FINE_TUNE,
            change={f"spec.{field}": settings},
        )
        for field, settings in (
            ("classification", {"balanced": True}),
            ("seq2seq", {"beams": 2}),
            ("speech", {"beams": 2}),
            ("tagging", {"labelPieces": "all"}),
            ("answering", {"stride": 64}),
            ("masking", {"unit": "word"}),
            ("embedding", {"scale": 10}),
        )
    ),
    FixedCase(
        field="image",
        base=FINE_TUNE,
        change={"spec.image.resolution": 512},
    ),
    FixedCase(
        field="resources",
        base=FINE_TUNE,
        change={"spec.resources.nodes": 2},
        excepted="gpuClass, gpuMemory, cpu, memory, ephemeralStorage",
    ),
    FixedCase(
        field="workspace",
        base=FINE_TUNE,
        change={"spec.workspace.claimName": "other"},
        excepted="ownership",
    ),
    FixedCase(
        field="task",
        base=GENERATE,
        change={"spec.task": "text-to-image"},
    ),
    FixedCase(
        field="model",
        base=GENERATE,
        change={"spec.model.revision": "v2"},
    ),
    FixedCase(
        field="adapters",
        base=GENERATE,
        change={"spec.adapters": [{"job": "tune"}]},
    ),
    FixedCase(
        field="outputs",
        base=changed(GENERATE, {"spec.inputs": BATCH}),
        change={"spec.outputs": {"format": "openai-batch"}},
    ),
    FixedCase(
        field="inputs",
        base=GENERATE,
        change={"spec.inputs.rows": [{"prompt": "a harp"}]},
    ),
    FixedCase(
        field="text",
        base=GENERATE,
        change={"spec.text.maxNewTokens": 3},
    ),
    FixedCase(
        field="image",
        base=GENERATE,
        change={"spec.image.steps": 3},
    ),
    *(
        FixedCase(
            field=block,
            base=GENERATE,
            change={f"spec.{block}": {}},
        )
        for block in BLOCKS
    ),
    FixedCase(
        field="precision",
        base=GENERATE,
        change={"spec.precision": "bf16"},
    ),
    FixedCase(
        field="batchSize",
        base=GENERATE,
        change={"spec.batchSize": 9},
    ),
    FixedCase(
        field="seed",
        base=GENERATE,
        change={"spec.seed": 9},
    ),
    FixedCase(
        field="shards",
        base=GENERATE,
        change={"spec.shards": 9},
    ),
    FixedCase(
        field="resources",
        base=GENERATE,
        change={"spec.resources.gpus": 0},
        excepted="gpuClass, gpuMemory, cpu, memory, ephemeralStorage",
    ),
    FixedCase(
        field="workspace",
        base=GENERATE,
        change={"spec.workspace.claimName": "other"},
        excepted="ownership",
    ),
]
