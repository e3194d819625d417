"""What the specs of both kinds share: where models and data come from, where work lies, what it may use, where results go."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Rule

ShortText = Annotated[str, Field(min_length=1, max_length=253)]
Path = Annotated[str, Field(min_length=1, max_length=1024)]
Quantity = Annotated[str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
JobName = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
KeyName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def exactly_one(*fields: str) -> str:
    """CEL: exactly one of `fields` is set."""
    return " + ".join(f"(has(self.{f}) ? 1 : 0)" for f in fields) + " == 1"


def at_most_one(*fields: str) -> str:
    """CEL: none or one of `fields` is set."""
    return " + ".join(f"(has(self.{f}) ? 1 : 0)" for f in fields) + " <= 1"


class NewModel(ApiModel):
    """A model made from a configuration, with new weights, and a byte-level BPE tokenizer trained on the dataset."""

    model_type: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9_\-]+$")]
    """transformers' name of the architecture, for example llama, qwen3, gpt2."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 8192
    """Size of the tokenizer's vocabulary, special tokens included."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture's transformers configuration, for example hidden_size: 256."""


class ModelSource(ApiModel):
    """Where the model comes from: exactly one of id, path, job and config."""

    id: Annotated[str | None, Field(max_length=200, pattern=r"^[-\w.]+(/[-\w.]+)?$")] = None
    """Repository on the Hub, for example Qwen/Qwen2.5-7B-Instruct."""
    revision: ShortText | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    path: Path | None = None
    """Folder inside the pods, for example on one of `volumes`."""
    job: JobName | None = None
    """A FineTuneJob of the same namespace, whose result is the model. An adapter is merged into its base."""
    config: NewModel | None = None
    """Start from new weights."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("id", "path", "job", "config"), "model: set exactly one of id, path, job and config"),
        Rule("!has(self.revision) || has(self.id)", "model.revision: only a model of the Hub has revisions; set model.id or remove it"),
    )


class DatasetSource(ApiModel):
    """Where the rows come from: exactly one of id (the Hub) and files."""

    id: Annotated[str | None, Field(max_length=200, pattern=r"^[-\w.]+(/[-\w.]+)?$")] = None
    """Dataset repository on the Hub."""
    revision: ShortText | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    name: ShortText | None = None
    """Configuration of a Hub dataset that has several."""
    files: Annotated[list[Path] | None, Field(min_length=1, max_length=256)] = None
    """Files or glob patterns inside the pods; for imagefolder, folders."""
    format: Literal["csv", "json", "jsonl", "parquet", "text", "imagefolder"] | None = None
    """Format of `files`; told from the first file's suffix when left out."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("id", "files"), "dataset: set exactly one of id and files"),
        Rule("!has(self.revision) || has(self.id)", "dataset.revision: only a dataset of the Hub has revisions; set dataset.id or remove it"),
        Rule("!has(self.name) || has(self.id)", "dataset.name: only a dataset of the Hub has configurations; set dataset.id or remove it"),
        Rule("!has(self.format) || has(self.files)", "dataset.format: belongs to dataset.files; a Hub dataset knows its own format"),
    )


class Workspace(ApiModel):
    """The volume where the phases meet and where results stay: a claim that exists, or one that the operator creates."""

    claim: ShortText | None = None
    """An existing PersistentVolumeClaim of the namespace. Each job works in a folder of its own on it."""
    size: Quantity | None = None
    """Size of the claim that the operator creates; 10Gi when left out."""
    storage_class: ShortText | None = None
    """Its storage class; the cluster's default when left out."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"] | None = None
    """Its access mode; ReadWriteMany where several pods work at once, else ReadWriteOnce."""
    when_deleted: Literal["Keep", "Delete"] = "Keep"
    """What becomes of the created claim when the job is deleted. Keep: results outlive the job and its TTL."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.claim) || !(has(self.size) || has(self.storageClass) || has(self.accessMode))",
            "workspace: size, storageClass and accessMode describe a new claim; remove them, or remove workspace.claim",
        ),
        Rule(
            "!has(self.claim) || self.whenDeleted == 'Keep'",
            "workspace.whenDeleted: a claim that you brought is never deleted; remove whenDeleted, or let the operator create the claim",
        ),
    )


class Volume(ApiModel):
    """A claim or config map of the namespace, mounted read-only into every pod of the job."""

    claim: ShortText | None = None
    config_map: ShortText | None = None
    mount_path: Annotated[str, Field(max_length=253, pattern=r"^/[-\w./]+$")]
    """Absolute folder in the pods."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("claim", "configMap"), "volumes: set exactly one of claim and configMap"),
        Rule(
            "!['/tmp', '/dev', '/run', '/etc', '/proc', '/sys', '/opt', '/usr', '/workspace', '/sources'].exists(p, self.mountPath == p"
            " || self.mountPath.startsWith(p + '/'))",
            "volumes.mountPath: that folder belongs to the pod; choose one such as /data or /models",
        ),
    )


class SecretKey(ApiModel):
    """A key of a Secret in the job's namespace."""

    name: ShortText
    key: KeyName = "token"


class Hub(ApiModel):
    """Where the result is published, and the token that reads private or gated sources."""

    repo: Annotated[str | None, Field(max_length=200, pattern=r"^[-\w.]+(/[-\w.]+)?$")] = None
    """Repository that receives the result; created when it does not exist. Without it nothing is published."""
    private: bool = True
    """Whether a repository that is created is private."""
    branch: ShortText = "main"
    """Branch that receives the commit."""
    token_secret: SecretKey | None = None
    """Token of the Hub; only the pods of `prepare` and `publish` get it."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("!has(self.repo) || has(self.tokenSecret)", "hub.tokenSecret: publishing to hub.repo needs a token with write access"),
        Rule("has(self.repo) || has(self.tokenSecret)", "hub: set repo (to publish), tokenSecret (to read private sources), or remove hub"),
    )


class Toleration(ApiModel):
    """A taint that the pods accept, as in a pod spec."""

    key: ShortText
    operator: Literal["Exists", "Equal"] = "Equal"
    value: Annotated[str | None, Field(max_length=253)] = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Scheduling(ApiModel):
    """Where and when the pods that do the work run."""

    queue: Annotated[str | None, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")] = None
    """Kueue LocalQueue for the pods that hold GPUs."""
    priority_class: ShortText | None = None
    """PriorityClass of the pods."""
    node_selector: Annotated[dict[str, str], Field(max_length=32)] = Field(default_factory=dict)
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)


class JobControl(ApiModel):
    """Fields of both kinds that steer a job and may change while it lives."""

    suspend: bool = False
    """Stop the pods after a checkpoint, hold no resources, and go on when it becomes false."""
    active_deadline_seconds: Annotated[int | None, Field(ge=1)] = None
    """Seconds from the start of the first phase after which the job is stopped and fails."""
    ttl_seconds_after_finished: Annotated[int | None, Field(ge=0)] = None
    """Seconds after which a finished job is deleted. Its workspace stays unless `workspace.whenDeleted` says otherwise."""
    plan_only: bool = False
    """Stop after `prepare` and show the plan in the status; false later lets the job go on."""


Volumes = Annotated[list[Volume], Field(max_length=16)]


def immutable(*fields: str) -> tuple[Rule, ...]:
    """A run is what its manifest said when it began: these fields never change."""
    return tuple(
        Rule(
            f"has(self.{f}) == has(oldSelf.{f}) && (!has(self.{f}) || self.{f} == oldSelf.{f})",
            f"spec.{f} cannot change once the job exists; create another job for another {f}",
        )
        for f in fields
    )
