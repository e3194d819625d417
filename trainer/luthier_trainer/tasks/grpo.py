"""grpo: learn from rewards for what the model itself writes (GRPO, arXiv:2402.03300), with TRL's GRPOTrainer.

In each step the model writes several completions of some prompts. Those that are rewarded more than the others of
their prompt become more likely.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.grpo import RewardFunction
from luthier_api.run import FineTuneRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import chats, columns, full_lengths, templates, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.masks import ChatReader, Unmasked, Unreadable
from luthier_trainer.data.reading import rows_at_once
from luthier_trainer.models import embedding, inspect, processors, sources
from luthier_trainer.models.materialize import whole_model
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks import reward_code, rewards
from luthier_trainer.tasks.base import Batch, LoadedModel, Model, OtherModel, TrainerSetup, TrainingContext
from luthier_trainer.tasks.texts import ADD_ROWS, TextTask, check_ends, reader_of, refuse_adapter_on_head

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from luthier_trainer.models.memory import Trial

PROMPT = "spec.dataset.columns.prompt"
REWARDS = "spec.grpo.rewards"
IDS = "prompt_ids"
TEXTS_AT_ONCE = 1_000
FIRST_REPORTS = 10  # after so many reports without a difference, a reward is told to be constant
NOTICED_SHARE = 0.1  # of the prompts, whose completions all have the same reward
LAST_SHARE = 0.1  # of the reports, whose mean is trainReward


class Grpo(TextTask):
    """The task grpo."""

    task = "grpo"
    reported = {"reward": "reward", "kl": "kl", "completions/mean_length": "tokens a completion"}

    # ---- prepare

    def inputs(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return (spec.dataset.columns.prompt,)

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.inputs(spec), *read_by_rewards(spec))))

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        """Return the rows with a prompt; messages as JSON text in the column `chats.CHAT`.

        Raises Failure if a column is missing or does not hold what it has to, or if a pattern cannot be used.
        """
        rewards.check_patterns(spec)
        column = spec.dataset.columns.prompt
        columns.require(rows, column, PROMPT)
        for cells, field in read_by_rewards(spec).items():
            columns.require(rows, cells, field, taken=[column])
        check_cells(rows, spec)
        if columns.is_text(rows.data.features[column]) and column not in rows.mixed:
            refuse_template(rows, spec)
            return columns.texts(rows, column, PROMPT, drop_blank=False)
        found = [json.dumps(messages, ensure_ascii=False) for messages in chats.prompts(rows, column, PROMPT)]
        data = rows.data.add_column(chats.CHAT, found)
        return replace(rows, data=data.select_columns([chats.CHAT, *read_by_rewards(spec)]))

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        check_ends(model.processor)
        super().check_model(model, spec, rows, labels)
        refuse_adapter_on_head(model, spec, self.task)

    def other_models(self, rows: Rows, run: FineTuneRun, folder: WorkspaceFolder) -> list[OtherModel]:
        """Provide reward models, and the code of rewards. Raises Failure if one does not exist, or cannot rate rows."""
        found = []
        for i, reward in enumerate(run.spec.grpo.rewards):
            if reward.file is not None:
                found.append(tried(reward, i, rows, run.spec.dataset.columns.prompt, folder))
            if reward.model is None:
                continue
            located = sources.locate(reward.model, run, f"{REWARDS}[{i}].model")
            path = whole_model(located, run, folder, reward.model.job, f"reward-{i}")
            config = inspect.read_config(path, located.field)
            tokenizer = processors.read_tokenizer(path, located.field)
            rewards.check_model(config, tokenizer, chats.CHAT in rows.data.column_names, located.field)
            found.append(OtherModel(path, located.origins))
        return found

    def encode(
        self,
        rows: Rows,
        processor: PreTrainedTokenizerBase,
        spec: FineTuneJobSpec,
        labels: list[str] | None,
        use: str,
    ) -> Dataset:
        """Return the prompts with their tokens, and the columns that rewards read.

        Prompts that leave no room for a completion are left out. Raises Failure if none is left.
        """
        import numpy
        from datasets import Features, List, Value

        column = spec.dataset.columns.prompt
        is_chat = chats.CHAT in rows.data.column_names
        if is_chat:
            column = chats.CHAT
            templates.choose(processor, spec.dataset.chat_template, "messages", "completions")
            to_ids = turns(ChatReader(processor, "completions", spec.dataset.parse_special_tokens), rows)
        else:
            reader = reader_of(rows, column, PROMPT, processor, spec, use)
            closes = reader(["a"])["input_ids"][0][-1:] == [processor.eos_token_id]

            def to_ids(texts: list[str]) -> list[list[int]]:
                read = reader(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
                return [ids[:-1] for ids in read] if closes else read  # some tokenizers end each text

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            ids = to_ids(batch[column])
            return {"prompt": batch[column], IDS: ids, "length": list(map(len, ids)), "is_chat": [is_chat] * len(ids)}

        features = {"prompt": Value("string"), IDS: List(Value("int32")), "length": Value("int64")}
        encoded = tokens.mapped(
            rows.data.select_columns([column]),
            tokenize,
            Features(features | {"is_chat": Value("bool")}),
            parallel=not is_chat,  # a conversation that cannot be written is refused where it is met
        )
        for name in read_by_rewards(spec):
            encoded = encoded.add_column(cells_of(name), rows.data[name][:])
        lengths = numpy.array(encoded["length"])
        full_lengths.keep(use, lengths)
        room = spec.training.max_length - spec.grpo.max_completion_length
        fits = numpy.flatnonzero(lengths <= room)
        if not len(fits):
            raise columns.invalid(
                f"{tokens.MAX_LENGTH}: no {use} prompt has {room} tokens or fewer, which"
                f" spec.grpo.maxCompletionLength: {spec.grpo.max_completion_length} leaves for it; set maxLength higher"
            )
        if len(fits) < len(lengths):
            notice(
                f"{tokens.MAX_LENGTH}: {len(lengths) - len(fits)} of {len(lengths)} {use} prompts have more than {room}"
                f" tokens, which spec.grpo.maxCompletionLength: {spec.grpo.max_completion_length} leaves for them; they"
                " are left out"
            )
        if use == "training":
            notice_repeats(spec, len(fits))
        return encoded.select(fits)

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        if chats.CHAT not in rows.data.column_names:
            yield from super().contents(rows, spec)
            return
        for batch in rows.data.select_columns([chats.CHAT]).iter(rows_at_once(rows.data, TEXTS_AT_ONCE)):
            yield ["\n".join(message["content"] for message in json.loads(row)) for row in batch[chats.CHAT]]

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        embedding.check_rows(model.missing_tokens, data, model.processor, inspect.MODEL, ADD_ROWS, (IDS,))
        embedding.notice_absent(model.new_tokens, data, model.processor, (IDS,))

    def count_tokens(self, data: Dataset) -> int:
        """Return the number of tokens in all prompts."""
        return sum(data["length"])

    def epoch_rows(self, spec: FineTuneJobSpec, rows: int, groups: Sequence[int] = ()) -> int:
        """Return the completions of an epoch. Its last step is filled up with prompts of its beginning."""
        prompts = prompts_a_step(spec)
        return -(-rows // prompts) * spec.training.batch_size

    def references(self, spec: FineTuneJobSpec) -> int:
        """Return 1 with a reference. What it costs to write the completions is left out."""
        return 1 if spec.grpo.beta else 0

    def tokens_a_row(self, spec: FineTuneJobSpec, rows: Dataset | None) -> float:
        """Return the tokens of a prompt and its completion, which may be shorter."""
        prompt = (
            super().tokens_a_row(spec, rows) if rows else spec.training.max_length - spec.grpo.max_completion_length
        )
        return prompt + spec.grpo.max_completion_length

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        from luthier_trainer.tasks import trl_steps

        return trl_steps.of_completions(model, self.task, spec, rows)

    # ---- training

    def rows(self, batch: Batch) -> int:
        return int(batch["rows"]) if "rows" in batch else len(batch["prompt_ids"])

    def tokens(self, batch: Batch) -> torch.Tensor | None:
        return None  # the trainer counts them: they are written in the step

    def computed_tokens(self, batch: Batch) -> int | None:
        return None

    def without_weight(self, batch: Batch) -> Batch:
        return batch  # never asked for: all steps are full

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        from trl import GRPOConfig

        grpo, size = spec.grpo, common["per_device_train_batch_size"]
        # Whole groups for each process, so that a held-out prompt is rated as one.
        groups = max(size // grpo.generations, 1)
        return GRPOConfig(
            **{**common, "per_device_eval_batch_size": groups * grpo.generations},
            num_generations=grpo.generations,
            max_completion_length=grpo.max_completion_length,
            temperature=grpo.temperature,
            top_p=grpo.top_p,
            top_k=0,
            beta=grpo.beta,
            loss_type=grpo.loss_type,
            scale_rewards=grpo.scale_rewards,
            mask_truncated_completions=grpo.mask_truncated_completions,
            reward_weights=[reward.weight for reward in grpo.rewards],
            # All completions of a step are written at its beginning, by the same weights, and none is used in a second
            # step. So a checkpoint, which is made after a step, need not hold completions.
            steps_per_generation=common["gradient_accumulation_steps"],
            num_iterations=1,
            gradient_checkpointing=False,  # `common` sets it under the name that transformers uses
        )

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from transformers import AutoModelForCausalLM

        return LoadedModel(AutoModelForCausalLM.from_pretrained(context.model_path, **context.weights))

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.grpo_trainer import Collator, GrpoTrainer

        spec, options = context.spec, dict[str, Any]()
        if context.spec.method.type == "full" and spec.grpo.beta:
            options["reference"] = self.load_model(context).model.eval().requires_grad_(False)
        models = iter(context.other_models)
        functions: dict[str, rewards.Rate | Path] = {}
        for i, (name, reward) in enumerate(rewards.named(spec).items()):
            if reward.type == "model":
                functions[name] = next(models)
            elif reward.type == "python":
                functions[name] = as_prepared(reward, i, next(models))
            else:
                functions[name] = rewards.FUNCTIONS[reward.type](reward)
        return TrainerSetup(GrpoTrainer, Collator(), options | {"functions": functions, "spec": spec})

    def metric_names(self, spec: FineTuneJobSpec) -> list[str]:
        return [*super().metric_names(spec), *(f"reward.{name}" for name in rewards.named(spec))]

    def training_metrics(self, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        found = reports(history)
        last = found[-max(round(LAST_SHARE * len(found)), 1) :]
        return {"trainReward": sum(entry["reward"] for entry in last) / len(last)} if last else {}

    def training_notices(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        found = reports(history)
        equal = sum(entry["frac_reward_zero_std"] for entry in found) / max(len(found), 1)
        if equal < NOTICED_SHARE:
            return []
        return [
            f"{REWARDS}: all completions had the same reward for {equal:.0%} of the prompts, which therefore gave no"
            " gradient. A reward that tells more completions apart, or more generations, makes use of them"
        ]


def reports(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the reports of the training that have a reward."""
    return [entry for entry in history if entry.get("reward") is not None and "loss" in entry]


def read_by_rewards(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return column → the field that names it, of the columns that rewards read."""
    found = {}
    for i, reward in enumerate(spec.grpo.rewards):
        if reward.column is not None:
            found[reward.column] = f"{REWARDS}[{i}].column"
        for n, column in enumerate(reward.columns or []):
            found.setdefault(column, f"{REWARDS}[{i}].columns[{n}]")
    return found


def cells_of(column: str) -> str:
    """Return the name of a column that rewards read in the prepared dataset. TRL has other columns of such names."""
    return f"of_row/{column}"


def prompts_a_step(spec: FineTuneJobSpec) -> int:
    """Return the number of prompts of an optimiser step over all processes."""
    return spec.training.batch_size // spec.grpo.generations


def check_cells(rows: Rows, spec: FineTuneJobSpec) -> None:
    """Raise Failure if a cell that completions are compared with is missing, or holds a list or an object."""
    compared = {reward.column for reward in spec.grpo.rewards}
    for column, field in read_by_rewards(spec).items():
        cells = rows.data[column][:] if column in compared else []
        odd = next((i for i, cell in enumerate(cells) if cell is None or isinstance(cell, list | dict)), None)
        if odd is not None or column in rows.mixed:
            where = f" in {rows.place(odd)}" if odd is not None else ""
            raise columns.invalid(
                f'{field}: column "{column}" of {rows.origin} holds no text or number{where}. Write each cell as the'
                " text that a completion has to be"
            )


def tried(reward: RewardFunction, number: int, rows: Rows, prompts: str, folder: WorkspaceFolder) -> OtherModel:
    """Return the copy of a reward's code, after its function has rated two completions of the first row.

    `prompts`: the column of prompts that are texts. Raises Failure if it could not.
    """
    where = f"{REWARDS}[{number}]"
    copy = folder.prepared / "rewards" / f"{number}.py"
    origin = reward_code.keep(reward, where, copy)
    first, is_chat = rows.data[0], chats.CHAT in rows.data.column_names
    prompt = first[chats.CHAT if is_chat else prompts]
    given = rewards.Completions(
        prompts=[prompt] * 2,
        texts=["", "An answer."],
        tokens=[1, 1],
        columns={name: [first[name]] * 2 for name in reward.columns or []},
        messages=is_chat,
        ids=[[0], [0]],
    )
    rate = reward_code.RatedByCode(copy, reward, where)
    try:
        found = rate(given)
    finally:
        rate.stop()
    notice(
        f"{where}: the pods run {rate.function} of {reward.file} as it is now (SHA-256 {origin.digest[:12]}), without"
        f' credentials. On the first row it returns {found[0]:g} for no text, and {found[1]:g} for "An answer."'
    )
    return OtherModel(copy, [origin])


def as_prepared(reward: RewardFunction, number: int, copy: Path) -> rewards.Rate:
    """Return a reward of Python code as `prepare` has tried it, and give notice if its file has changed since."""
    where = f"{REWARDS}[{number}]"
    if reward_code.has_changed(reward, copy):
        notice(
            f"{where}.file: {reward.file} has changed since this job was prepared. The training uses the code as it was"
            " then; a new job uses it as it is"
        )
    return reward_code.RatedByCode(copy, reward, where)


def refuse_template(rows: Rows, spec: FineTuneJobSpec) -> None:
    """Raise Failure if the job names a chat template for prompts that are texts."""
    if spec.dataset.chat_template is not None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{templates.FIELD}: the prompts of {rows.origin} are texts, which have no messages; remove it, or write"
            " each prompt as a list of messages",
        )


def turns(reader: ChatReader, rows: Rows) -> Any:
    """Return a function from JSON texts of messages to their tokens, after which the assistant begins to write."""

    def to_ids(texts: list[str]) -> list[list[int]]:
        """Return the tokens of each text. Raises Failure if the template cannot write one."""
        found = []
        for text in texts:
            try:
                ids, _ = reader.tokenize(reader.render(json.loads(text), open_turn=True))
            except (Unreadable, Unmasked) as error:
                raise columns.invalid(f"{PROMPT}: a prompt of {rows.origin} cannot be written: {error}") from None
            bos = reader.tokenizer.bos_token_id
            found.append(ids[1:] if ids[:2] == [bos, bos] else ids)
        return found

    return to_ids


def notice_repeats(spec: FineTuneJobSpec, prompts: int) -> None:
    """Give notice of prompts that come twice in an epoch."""
    a_step = prompts_a_step(spec)
    missing = -prompts % a_step
    if missing:
        notice(
            f"spec.training.batchSize: a step has {a_step} prompts with {spec.grpo.generations} completions each, and"
            f" {prompts} prompts do not fill the last step of an epoch; {missing} more come twice in it"
        )
