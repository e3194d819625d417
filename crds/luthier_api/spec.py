"""Types that the specs of both kinds use: sources of models and data, workspace, volumes, Hub, life cycle."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Format, Rule, map_by
from luthier_api.decides import BUDGET, CIRCUMSTANCES, LIFE_CYCLE
from luthier_api.formats import FORMATS, DatasetFormat
from luthier_api.marks import For, by_table
from luthier_api.methods import QuantizationType
from luthier_api.quantity import Bytes, Cores

ShortText = Annotated[str, Field(min_length=1, max_length=253)]
SYSTEM_FOLDERS = ("dev", "etc", "proc", "run", "sys", "var/run")
"""Folders whose files describe a pod, its processes and its credentials. They are never data."""
Path = Annotated[
    str,
    Field(min_length=1, max_length=1024),
    Format(
        "^.",
        f"must not be a file of the pod itself, under /{', /'.join(SYSTEM_FOLDERS)}; mount a volume (spec.volumes), for"
        " example at /data",
        never=f"^/+({'|'.join(SYSTEM_FOLDERS)})(/|$)",
    ),
]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seconds = Annotated[int, Field(ge=0, le=2**31 - 1)]  # as wide as Kubernetes' own

# The job refuses what the API server would refuse in a child, and what would make a pod fail.
LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"  # of RFC 1123
WORD = "[a-zA-Z0-9]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?"
REPOSITORY = (  # with what is never in one: huggingface_hub's validate_repo_id
    "[_a-zA-Z0-9]([-_.a-zA-Z0-9]{0,94}[_a-zA-Z0-9])?"
)
# with what is never in one: git check-ref-format; of its characters those that need no quotes
REF = "^[_a-zA-Z0-9][-_.+=@#/a-zA-Z0-9]*$"
NEVER_IN_REF = "[.][.]|//|/[.]|[.]lock(/|$)|[./]$"

OBJECT_NAME = Format(
    f"^{LABEL}([.]{LABEL})*$",
    "must be the name of a Kubernetes object: lower-case letters, digits, '-' and '.', such as team-a",
)
ObjectName = Annotated[str, Field(min_length=1, max_length=253), OBJECT_NAME]
QueueName = Annotated[str, Field(min_length=1, max_length=63), OBJECT_NAME]
JobName = Annotated[
    str,
    Field(min_length=1, max_length=40),
    Format(f"^{LABEL}$", "must be the name of a FineTuneJob: lower-case letters, digits and '-'"),
]
KeyName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Format(
        "^[.]?[-_a-zA-Z0-9][-._a-zA-Z0-9]*$",
        "must be a key of a Secret: letters, digits, '-', '_' and '.', such as token",
    ),
]
MountPath = Annotated[
    str,
    Field(max_length=253),
    Format(
        "^(/[.]*[-_a-zA-Z0-9][-_.a-zA-Z0-9]*)+$",
        "must be an absolute folder such as /data or /models/base, without '..', '//' or a '/' at its end",
    ),
]
Repository = Annotated[
    str,
    Field(max_length=193),
    Format(
        f"^{REPOSITORY}(/{REPOSITORY})?$",
        never="--|[.][.]|[.]git$",
        words=(
            "must be a repository of the Hub, OWNER/NAME, such as Qwen/Qwen3-8B: 96 characters each at most, without"
            " '--' and '..', and no .git at the end"
        ),
    ),
]
Revision = Annotated[
    str,
    Field(max_length=253),
    Format(REF, "must be a branch, a tag or a commit, such as main, v1.0 or refs/pr/3", never=NEVER_IN_REF),
]
Branch = Annotated[
    str, Field(max_length=253), Format(REF, "must be the name of a branch, such as main or team/v2", never=NEVER_IN_REF)
]
Encoding = Annotated[
    str,
    Field(max_length=32),
    Format("^[a-zA-Z0-9][-_a-zA-Z0-9]*$", "must be Python's name of an encoding, such as cp1252 or utf-16-le"),
]


def exactly_one(*fields: str) -> str:
    """CEL: exactly one of `fields` is set."""
    return " + ".join(f"(has(self.{f}) ? 1 : 0)" for f in fields) + " == 1"


def at_most_one(*fields: str) -> str:
    """CEL: none or one of `fields` is set."""
    return " + ".join(f"(has(self.{f}) ? 1 : 0)" for f in fields) + " <= 1"


def train_alone(field: str, name: str = "dataset") -> Rule:
    """Files are one split. `name`: of the field that holds the dataset."""
    return Rule(
        f"!has(self.files) || !has(self.{field}) || self.{field}.matches('^train([^._a-zA-Z0-9]|$)')",
        f"{name}.{field}: files are one split, train; write train or a part of it, such as train[:90%]",
    )


def alone_on_its_claim(pods: str, alone: str) -> Rule:
    """`pods`: the field that says how many work at once. `alone`: CEL for that it is one."""
    return Rule(
        f"!has(self.workspace.accessMode) || self.workspace.accessMode != 'ReadWriteOncePod' || {alone}",
        f"spec.workspace.accessMode: ReadWriteOncePod lets one pod work at a time; use ReadWriteMany, or set {pods}: 1",
    )


TokenizerType = Literal["bpe", "wordpiece", "unigram"]
TOKENIZER_TYPE: TokenizerType = "bpe"
"""Of a new tokenizer."""
VOCABULARY = 8192
"""Entries of a new tokenizer."""


class TokenizerTraining(ApiModel):
    """A tokenizer trained on the texts of the training rows, by the library tokenizers. That of a trained model keeps
    its entries, and gets others beside them.
    """

    type: TokenizerType | None = None
    """For a model from `config`, bpe when left out. bpe: byte-level BPE, as GPT-2 has it, which can write any text.
    wordpiece: as BERT (cased). unigram: as T5 and SentencePiece. The last two read characters that no training row has
    as an unknown token.
    """
    vocab_size: Annotated[int | None, Field(ge=260, le=1_000_000)] = None
    """Entries, control tokens included; `model.config.vocabSize` when left out. There are fewer if the texts have no
    more pieces. For a trained model: those that its tokenizer has then, its own included. Each piece that it lacks
    joins two that it has.
    """
    special_tokens: Annotated[list[ShortText] | None, Field(min_length=1, max_length=64)] = None
    """Control tokens beside those of the task, such as those of a chat template: <|im_start|>. For a trained model, the
    same as `addSpecialTokens`.
    """


class NewTokenizer(ApiModel):
    """The tokenizer of a new model, or what the tokenizer of a trained one gets."""

    train: TokenizerTraining = Field(default_factory=TokenizerTraining)


class NewModel(ApiModel):
    """A model made from a configuration, with new weights, and a tokenizer trained on the dataset."""

    model_type: Annotated[
        str,
        Field(max_length=64),
        Format("^[-_a-z0-9]+$", "must be transformers' name of an architecture, such as llama"),
    ]
    """transformers' name of the architecture, for example llama, qwen3, gpt2."""
    vocab_size: Annotated[int | None, Field(ge=260, le=1_000_000)] = None
    """Size of the tokenizer's vocabulary, special tokens included; 8192 when left out."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture's transformers configuration, for example hidden_size: 256."""


class Quantization(ApiModel):
    """The data type in which frozen weights are stored."""

    type: QuantizationType
    """nf4: 4 bits, for normally distributed weights. fp4: 4 bits, floating point. int8: 8 bits, by LLM.int8()."""


NEW_WEIGHTS = "new weights are trained whole: set method.type: full"
NEW_ROWS = "the rows of new tokens learn with one of these alone; choose one, or a tokenizer that fits the model"


class ModelSource(ApiModel):
    """Where the model comes from: exactly one of id, path, job and config."""

    id: Repository | None = None
    """Repository on the Hub, for example Qwen/Qwen2.5-7B-Instruct."""
    revision: Revision | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    path: Path | None = None
    """Folder inside the pods, for example on one of `volumes`."""
    job: Annotated[JobName | None, For("task", remedy="set model.id or model.path")] = None
    """A FineTuneJob of the same namespace, whose result is the model. An adapter is merged into its base."""
    config: Annotated[NewModel | None, For("task"), For("method", remedy=NEW_WEIGHTS)] = None
    """Start from new weights."""
    tokenizer: Annotated[NewTokenizer | None, For("task"), For("method", remedy=NEW_ROWS)] = None
    """Which tokenizer a model from `config` gets; a byte-level BPE when left out. The tokenizer of a trained model gets
    pieces of the rows' texts that it lacks. Each gets a row in the embedding, which begins as the mean of the pieces
    that it joins, and learns.
    """
    quantization: Annotated[Quantization | None, For("task"), For("method")] = by_table()
    """Hold the frozen weights of the model's linear layers in a smaller type. The adapter's base stays the model as it
    was published.
    """
    resize_embeddings: Annotated[bool, For("task"), For("method", remedy=NEW_ROWS)] = by_table()
    """Give each token of the tokenizer that has no row in the model's embedding a new one. Otherwise such a tokenizer
    is refused. The new rows are drawn around the mean of the others by the training's seed, and learn. With full,
    `prepare` holds the whole model in memory meanwhile; an adapter holds these rows itself.
    """
    add_special_tokens: Annotated[
        list[ShortText], Field(min_length=1, max_length=64), For("task"), For("method", remedy=NEW_ROWS)
    ] = by_table()
    """Tokens that the tokenizer gets, such as those of a chat template: <|im_start|>. Each gets a row in the embedding
    as with resizeEmbeddings. Texts that spell them are read as ordinary text, unless parseSpecialTokens is set.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("id", "path", "job", "config"), "model: set exactly one of id, path, job and config"),
        Rule(
            "!has(self.revision) || has(self.id)",
            "model.revision: only a model of the Hub has revisions; set model.id or remove it",
        ),
        Rule(
            "!has(self.config) || !has(self.resizeEmbeddings) || !self.resizeEmbeddings",
            "model.resizeEmbeddings: a model from model.config has a row for each token; remove resizeEmbeddings",
        ),
        Rule(
            "!has(self.config) || !has(self.addSpecialTokens)",
            "model.addSpecialTokens: the tokenizer of a model from model.config is made from the dataset; remove it, or"
            " use model.tokenizer.train.specialTokens",
        ),
        Rule(
            "!has(self.tokenizer) || has(self.config) || !has(self.tokenizer.train.type)",
            "model.tokenizer.train.type: the tokenizer of a trained model gets more pieces and keeps its type; remove"
            " it, or use config for a model with new weights",
        ),
        Rule(
            "!has(self.tokenizer) || has(self.config) || has(self.tokenizer.train.vocabSize) ||"
            " has(self.tokenizer.train.specialTokens)",
            "model.tokenizer.train: set vocabSize to the entries that the tokenizer of a trained model has with the"
            " pieces that it gets, or specialTokens, or both",
        ),
        Rule(
            "!has(self.tokenizer) || !has(self.tokenizer.train.vocabSize) || !has(self.config) ||"
            " !has(self.config.vocabSize)",
            "model.tokenizer.train.vocabSize: config.vocabSize says it, too; set one of them",
        ),
    )

    @property
    def vocabulary(self) -> int:
        """Entries of the tokenizer of a new model, at most."""
        asked = self.tokenizer.train.vocab_size if self.tokenizer else None
        return asked or (self.config.vocab_size if self.config else None) or VOCABULARY


class Csv(ApiModel):
    """How CSV files are written."""

    separator: Literal["comma", "semicolon", "tab", "pipe"] | None = None
    """The character between two cells. When left out: tab for .tsv files, comma for all others."""
    quoting: Literal["double", "backslash", "none"] | None = None
    """How a cell holds quotation marks. double: the cell stands between quotation marks, and those inside are doubled.
    backslash: the same, with a backslash before those inside. none: they are ordinary characters. When left out: none
    where the separator is a tab, and else the one of double and backslash by which the file can be read.
    """


TEXT_FORMATS = tuple(name for name, info in FORMATS.items() if info.text)


def source_rules(name: str, *others: str) -> tuple[Rule, ...]:
    """Rules of where rows come from. `name`: of the field that holds such an object. `others`: fields besides id and
    files that say it.
    """
    return (
        Rule(exactly_one("id", "files", *others), f"{name}: set exactly one of {', '.join(['id', *others])} and files"),
        Rule(
            "!has(self.revision) || has(self.id)",
            f"{name}.revision: only a dataset of the Hub has revisions; set {name}.id or remove it",
        ),
        Rule(
            "!has(self.name) || has(self.id)",
            f"{name}.name: only a dataset of the Hub has configurations; set {name}.id or remove it",
        ),
        Rule(
            "!has(self.format) || has(self.files)",
            f"{name}.format: belongs to {name}.files; a Hub dataset knows its own format",
        ),
        Rule(
            "!has(self.csv) || !has(self.format) || self.format == 'csv'",
            f"{name}.csv: belongs to files of the format csv; remove it, or set format: csv",
        ),
        Rule(
            f"!has(self.encoding) || !has(self.format) || self.format in {list(TEXT_FORMATS)}",
            f"{name}.encoding: belongs to files of text ({', '.join(TEXT_FORMATS)}); remove it",
        ),
    )


class DatasetSource(ApiModel):
    """Where the rows come from: exactly one of id (the Hub) and files."""

    id: Repository | None = None
    """Dataset repository on the Hub."""
    revision: Revision | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    name: ShortText | None = None
    """Configuration of a Hub dataset that has several."""
    files: Annotated[list[Path] | None, Field(min_length=1, max_length=256)] = None
    """Files or glob patterns inside the pods; for imagefolder, folders; for webdataset, archives (.tar). A folder that
    `save_to_disk` of `datasets` has written stands for its Arrow files. `prepare` downloads what has an address:
    http:// and https://, and s3://, gs:// and az:// (`spec.stores`). Those of a store may be patterns, or end with /
    for all files below.
    """
    format: DatasetFormat | None = None
    """Format of `files`; told from the first file's suffix when left out."""
    csv: Csv | None = None
    """How CSV files are written."""
    encoding: Encoding | None = None
    """Encoding of files of text (csv, json, jsonl, text). When left out, that of their byte order mark, or UTF-8; files
    that are not text in it are refused.
    """

    rules: ClassVar[tuple[Rule, ...]] = source_rules("dataset")


class Workspace(ApiModel):
    """The volume that all phases share and that keeps the results: an existing claim, or one that Luthier creates."""

    claim_name: ObjectName | None = None
    """An existing PersistentVolumeClaim of the namespace. Each job works in a folder of its own on it."""
    size: Bytes | None = None
    """Size of the claim that the operator creates, for example 200Gi. When left out, what the administrator has set
    (`jobs.workspaceSize` of the chart; 10Gi if they have not).
    """
    storage_class_name: ObjectName | None = None
    """Its storage class; the cluster's default when left out."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"] | None = None
    """Its access mode; ReadWriteMany where several pods work at once, else ReadWriteOnce."""
    when_deleted: Literal["Keep", "Delete"] = "Keep"
    """Whether the created claim is deleted with the job. Keep: results remain after the job and its TTL."""
    ownership: Annotated[Literal["Keep", "Change"], CIRCUMSTANCES] = "Keep"
    """Whether Kubernetes may change owners on an existing claim. Keep: it does not, so user or group 1000 must be able
    to write at the root of the claim. Change: the first pod gives every file on it to group 1000 and lets that group
    read and write it (fsGroup); for a claim that holds nothing else. A claim that the operator creates needs neither.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.claimName) || !(has(self.size) || has(self.storageClassName) || has(self.accessMode))",
            "workspace: size, storageClassName and accessMode describe a new claim; remove them, or remove"
            " workspace.claimName",
        ),
        Rule(
            "!has(self.claimName) || self.whenDeleted == 'Keep'",
            "workspace.whenDeleted: an existing claim is never deleted; remove whenDeleted, or let the operator"
            " create the claim",
        ),
        Rule(
            "has(self.claimName) || self.ownership == 'Keep'",
            "workspace.ownership: belongs to workspace.claimName, an existing claim; a claim that the operator creates"
            " belongs to the pods anyway. Remove it",
        ),
    )


RESERVED = (
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "opt",
    "proc",
    "root",
    "run",
    "sbin",
    "sources",
    "sys",
    "tmp",
    "usr",
    "var",
    "workspace",
)
"""Folders of the image, of the pod and of Luthier: a volume there would hide them, or could not be reached."""


class Volume(ApiModel):
    """A claim or config map of the namespace, mounted read-only into every pod of the job."""

    claim_name: ObjectName | None = None
    """PersistentVolumeClaim to mount, whole."""
    config_map: ObjectName | None = None
    """ConfigMap to mount: each of its keys is a file."""
    mount_path: MountPath
    """Absolute folder in the pods, for example /data; none of the system's, such as /tmp or /usr."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("claimName", "configMap"), "volumes: set exactly one of claimName and configMap"),
        Rule(
            f"!self.mountPath.matches('^/({'|'.join(RESERVED)})(/|$)')",
            "volumes.mountPath: that folder belongs to the pod; choose one such as /data or /models",
        ),
    )


class SecretKey(ApiModel):
    """A key of a Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: KeyName = "token"
    """Key of the Secret that holds the value."""

    def credentials(self) -> dict[str, str]:
        """Credential → key of the Secret, for `luthier_api.secrets`."""
        return {"token": self.key}


class Hub(ApiModel):
    """Where the result is published, and the token that reads private or gated sources."""

    repo: Repository | None = None
    """Repository that receives the result; created when it does not exist. Its README.md is replaced, and files of an
    earlier result of Luthier that are no longer part of it are removed. Without it nothing is published.
    """
    private: bool = True
    """Whether a repository that is created is private."""
    branch: Branch = "main"
    """Branch that receives the commit."""
    token_secret_ref: SecretKey | None = None
    """Token of the Hub; only the pods of `prepare` and `publish` get it."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.repo) || has(self.tokenSecretRef)",
            "hub.tokenSecretRef: publishing to hub.repo needs a token with write access",
        ),
        Rule(
            "has(self.repo) || has(self.tokenSecretRef)",
            "hub: set repo (to publish), tokenSecretRef (to read private sources), or remove hub",
        ),
        Rule(
            "has(self.repo) || self.branch == 'main'",
            "hub.branch: belongs to hub.repo, the repository to publish to; set hub.repo, or remove branch",
        ),
        Rule(
            "has(self.repo) || self.private",
            "hub.private: belongs to hub.repo, the repository to publish to; set hub.repo, or remove private",
        ),
    )


class PhaseResources(ApiModel):
    """The pod of `prepare` or `publish`, which holds no GPU. What is left out, the administrator has set
    (`jobs.prepareResources` and `jobs.publishResources` of the chart).
    """

    cpu: Cores | None = None
    """CPU request, in cores, for example 4 or 500m."""
    memory: Bytes | None = None
    """Memory request and limit, for example 16Gi."""
    ephemeral_storage: Bytes | None = None
    """Local disk for /tmp, as request and limit, for example 50Gi."""


class PrepareResources(PhaseResources):
    """The pod of `prepare`."""

    num_proc: Annotated[int | None, Field(ge=1, le=1024)] = None
    """Processes that convert rows into tokens. When left out, as many as `cpu`, or else as the cores that the pod may
    use, and 32 at most. Each takes about 200 MB of memory.
    """


class JobControl(ApiModel):
    """Fields of both kinds that control the life cycle of a job."""

    suspend: Annotated[bool, LIFE_CYCLE] = False
    """Stop the pods after a checkpoint and release their resources. The job resumes when it becomes false."""
    active_deadline_seconds: Annotated[Annotated[Seconds, Field(ge=1)] | None, LIFE_CYCLE] = None
    """Seconds of work after which the job is stopped and fails; no limit when left out. The time in which it is
    suspended, waits in a queue or rests after its plan does not count. A failed job that resumes has the whole time
    again.
    """
    ttl_seconds_after_finished: Annotated[Seconds | None, LIFE_CYCLE] = None
    """Seconds after which a finished job is deleted; it stays when left out. Its workspace stays unless
    `workspace.whenDeleted` says otherwise.
    """
    plan_only: Annotated[bool, LIFE_CYCLE] = False
    """Stop after `prepare` and show the plan in the status. Set it to false later to continue the job."""
    retry: Annotated[int, Field(ge=0, le=1_000_000), BUDGET] = 0
    """Another number starts a failed job again as it is: it resumes from its newest checkpoint, with all its restarts
    and its whole time. A failed job also resumes when `hub`, `scheduling`, `volumes`, its restarts or its resources
    change.
    """


Volumes = Annotated[list[Volume], Field(max_length=16), map_by("mountPath")]
