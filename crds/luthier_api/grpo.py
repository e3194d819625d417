"""The settings of the task grpo: what is rewarded, and how completions are made. `rewards` has a row for each kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from luthier_api.base import ApiModel, Format, Rule
from luthier_api.rewards import FIELDS as REWARD_FIELDS
from luthier_api.rewards import REWARDS, RewardType
from luthier_api.spec import JobName, Path, Repository, Revision, ShortText, exactly_one


class RewardModel(ApiModel):
    """Where a reward model comes from: exactly one of id, path and job."""

    id: Repository | None = None
    """Repository on the Hub with a model for sequence classification that has one output."""
    revision: Revision | None = None
    """Branch, tag or commit of `id`; `main` when left out. `prepare` resolves it to a commit."""
    path: Path | None = None
    """Folder inside the pods, for example on one of `volumes`."""
    job: JobName | None = None
    """A FineTuneJob of the same namespace with the task reward. An adapter is merged into its base."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(exactly_one("id", "path", "job"), "model: set exactly one of id, path and job"),
        Rule(
            "!has(self.revision) || has(self.id)",
            "model.revision: only a model of the Hub has revisions; set id or remove it",
        ),
    )


def of_reward_types() -> Iterator[Rule]:
    """Yield the rules that a field belongs to some types of rewards only, and that a type needs a field."""
    for field in REWARD_FIELDS:
        types = [name for name, info in REWARDS.items() if field in info.needs + info.takes]
        yield Rule(
            f"!has(self.{field}) || self.type in {types}",
            f"rewards.{field}: applies to {', '.join(types)}; remove it, or choose another type",
        )
    for name, info in REWARDS.items():
        for field in info.needs:
            yield Rule(
                f"self.type != '{name}' || has(self.{field})", f"rewards.{field}: a reward of type {name} needs it"
            )


FunctionName = Annotated[
    str,
    Field(max_length=253),
    Format("^[A-Za-z_][A-Za-z0-9_]*$", "must be the name of a function of Python, such as reward"),
]


class RewardFunction(ApiModel):
    """A number for each completion, of which more is better."""

    type: RewardType
    """exactMatch: 1 if the completion, without blanks around it, is the text in `column` of its row, else 0. regex: 1
    if `pattern` is found in it, else 0. length: 1 for a completion of `tokens` tokens, and less in proportion to its
    distance from there, down to 0. json: 1 if it is a JSON value, else 0. model: the output of a reward model. python:
    what a function of your own returns, where the administrator allows it (`jobs.pythonRewards` of the chart).
    """
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """Factor in the sum of all rewards. A negative one makes less of it better."""
    column: ShortText | None = None
    """Column of the dataset with the text to match (exactMatch)."""
    pattern: Annotated[str | None, Field(min_length=1, max_length=1000)] = None
    """Regular expression of Python (regex). With exactMatch: what its first group finds last in the completion is
    compared, so that a model may explain its answer.
    """
    tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    """Tokens of a completion (length), with its end-of-text token."""
    shorter: bool | None = None
    """Whether shorter completions are as good (length); false when left out."""
    keys: Annotated[list[ShortText] | None, Field(min_length=1, max_length=64)] = None
    """Keys that the value must have, which must then be an object (json)."""
    model: RewardModel | None = None
    """The reward model (model)."""
    file: Path | None = None
    """Python file inside the pods, for example of a config map in `volumes` (python). `prepare` tries the function and
    keeps a copy of the file, which the training uses. The function runs in a process of its own, without credentials.
    """
    function: FunctionName | None = None
    """Function of `file`; `reward` when left out (python). It is called as TRL calls its own, with the keywords
    `prompts`, `completions`, `completion_ids` and `columns`, and returns a number for each completion.
    """
    columns: Annotated[list[ShortText] | None, Field(min_length=1, max_length=32)] = None
    """Columns of the dataset that the function gets by their names (python)."""
    timeout_seconds: Annotated[int | None, Field(ge=1, le=86400)] = None
    """Seconds within which the function has to rate the completions of a step (python); 60 when left out. A function
    that takes longer ends the training.
    """

    rules: ClassVar[tuple[Rule, ...]] = tuple(of_reward_types())


class Grpo(ApiModel):
    """How a model learns from rewards for what it writes (GRPO, arXiv:2402.03300)."""

    rewards: Annotated[list[RewardFunction], Field(max_length=8)] = Field(default_factory=list)
    """What is rewarded. The rewards of a completion are multiplied by their weights and added."""
    generations: Annotated[int, Field(ge=2, le=256)] = 8
    """Completions of each prompt, which are compared with each other. batchSize counts completions, and is a multiple
    of it.
    """
    max_completion_length: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Tokens after which a completion is cut off. Prompts have training.maxLength tokens less these at most."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Of the sampling: higher values make completions more diverse."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the probability that the sampled tokens have together."""
    beta: Annotated[float, Field(ge=0, le=10)] = 0.0
    """How strongly the model is held to the one it started from. 0: not at all, and no reference model is in memory."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """dapo: the mean over all tokens of a step (arXiv:2503.14476). grpo: the mean over the tokens of each completion
    first. dr_grpo: the sum over tokens by maxCompletionLength (arXiv:2503.20783), without a preference for lengths.
    """
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By which standard deviation rewards are divided: over the completions of a prompt, over those of the step, or by
    none.
    """
    mask_truncated_completions: bool = False
    """Leave completions that were cut off out of the loss. They are rewarded in any case."""

    @property
    def runs_code(self) -> bool:
        """Whether code of the user runs in the pods."""
        return any(reward.type == "python" for reward in self.rewards)
