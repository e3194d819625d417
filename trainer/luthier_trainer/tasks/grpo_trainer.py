"""The trainer of the task grpo. It imports torch and TRL at the top; `tasks.grpo` imports it in the training only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.grpo import FIRST_REPORTS, IDS, REWARDS, cells_of, prompts_a_step, read_by_rewards
from luthier_trainer.tasks.rewards import Completions, Rate, load_model
from luthier_trainer.tasks.trl_trainer import Quiet, check_fused_head

Examples = list[dict[str, Any]]


@dataclass
class Collator:
    """Passes rows on as they are. `GrpoTrainer` makes tensors of them when their completions are written."""

    repeats: int = 1
    """Micro-batches of a process in a step. TRL reads all rows of the step for each of them, and uses a part."""

    def __call__(self, rows: Examples) -> dict[str, Any]:
        """Return rows as a batch, with the number of those that count in it."""
        return {"examples": rows, "rows": len(rows) // self.repeats}


class PromptOrder(Sampler[int]):
    """Yields the positions of the prompts of an epoch: each `generations` times, all of a step `repeats` times.

    The order depends on seed and epoch alone, so that a resumed run goes on in it; that of TRL 1.16 begins anew. The
    last step of an epoch is filled up with prompts of its beginning, which TRL would leave out.
    """

    def __init__(self, prompts: int, a_step: int, generations: int, repeats: int, seed: int) -> None:
        """`a_step`: prompts of an optimiser step. `repeats`: micro-batches of a process in it."""
        self.prompts, self.a_step, self.generations, self.repeats, self.seed = (
            prompts,
            a_step,
            generations,
            repeats,
            seed,
        )
        self.epoch = 0

    @property
    def steps(self) -> int:
        """Return the optimiser steps of an epoch."""
        return -(-self.prompts // self.a_step)

    def __len__(self) -> int:
        return self.steps * self.a_step * self.generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.prompts, generator=generator).tolist()
        for step in range(self.steps):
            chosen = [order[i % self.prompts] for i in range(step * self.a_step, (step + 1) * self.a_step)]
            for _ in range(self.repeats):
                for prompt in chosen:
                    yield from [prompt] * self.generations


class GrpoTrainer(Quiet, GRPOTrainer):
    """TRL's trainer with prompts that `prepare` has tokenized, an order that can be resumed, and exact evaluations."""

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        data_collator: Any,
        functions: Mapping[str, Rate | Path],
        spec: FineTuneJobSpec,
        reference: Any = None,
        **options: Any,
    ) -> None:
        """`functions`: name → reward, or the folder of a reward model. `reference`: the model without the training, if
        it is not the model without its adapters.
        """
        self.spec, self.names = spec, list(functions)
        self._rates: list[Rate] = [
            load_model(rate, args.device) if isinstance(rate, Path) else rate for rate in functions.values()
        ]
        self._told: set[str] = set()
        self._prompt_order = PromptOrder(
            len(train_dataset),
            prompts_a_step(spec),
            spec.grpo.generations,
            args.steps_per_generation,
            args.seed,
        )
        if eval_dataset is not None:
            each = torch.arange(len(eval_dataset)).repeat_interleave(spec.grpo.generations)
            eval_dataset = eval_dataset.select(each.tolist())
        # TRL 1.16 loads a reference model by the name in the configuration, whatever lies there by now, or copies the
        # adapter. With beta 0 it does neither.
        beta, args.beta = args.beta, 0.0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            reward_funcs=[self._function(i) for i in range(len(functions))],
            **options,
        )
        args.beta = self.beta = beta
        self.data_collator = replace(data_collator, repeats=args.steps_per_generation)
        self.compute_metrics = RewardMetrics(spec, self.names)
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = reference.to(args.device)
        check_fused_head(model, self.temperature)

    def _function(self, number: int) -> Any:
        """Return a reward in the form that TRL calls."""

        def rate(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
            read = {name: columns[cells_of(name)] for name in read_by_rewards(self.spec)}
            lengths = [len(ids) for ids in completion_ids]
            is_chat = bool(columns["is_chat"][0])
            given = Completions(columns["prompts"], completions, lengths, read, is_chat, completion_ids)
            return list(self._rates[number](given))

        rate.__name__ = self.names[number]
        return rate

    # ---- batches

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return self._prompt_order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)  # each prompt stands there as often as it is completed

    def _run_epoch(self, **kwargs: Any) -> None:
        self._prompt_order.epoch = kwargs["epoch"]
        super()._run_epoch(**kwargs)

    def _prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = super()._prepare_inputs(batch["examples"])
        return found

    def _generate_and_score_completions(self, inputs: Examples) -> dict[str, Any]:
        self._ids = [row[IDS] for row in inputs]
        found: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return found

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self._ids, None, {}

    def _calculate_rewards(self, inputs: Examples, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, *args, **kwargs)
        first = self.accelerator.process_index * len(inputs)
        self._own_rewards = rewards[first : first + len(inputs)]
        return rewards

    # ---- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the same random numbers each time, and without changing those of the training."""
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.args.process_index)
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        """Return the mean loss; and of each completion its rewards, its tokens, whether it was cut off and its KL.

        The second value is double [completions, rewards + 3]. The third one is a placeholder for labels.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            batch = self._prepare_inputs(inputs)
            mask = batch["completion_mask"]
            lengths = mask.sum(dim=1)
            kl = self._kl(model, batch) if self.beta else torch.zeros_like(lengths, dtype=torch.float)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=lengths.device)
        last = batch["completion_ids"].gather(1, (lengths - 1).clamp(min=0)[:, None])
        cut = ~torch.isin(last[:, 0], ends)
        rows = torch.column_stack([self._own_rewards, lengths, cut, kl]).double()
        weights = torch.tensor([reward.weight for reward in self.spec.grpo.rewards], device=rows.device).double()
        loss = self.beta * kl.mean() - (rows[:, : len(weights)] @ weights).mean()
        return loss, rows, torch.zeros(len(rows), device=rows.device)

    def _kl(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean over its tokens of each completion's distance from the reference, in nats [completions]."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        mask = batch["completion_mask"]
        own = self._get_per_token_logps_and_entropies(model, ids, attended, mask.shape[1])[0]
        more = batch["ref_per_token_logps"] - own
        distances: torch.Tensor = ((more.exp() - more - 1) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return distances

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._metrics[
            "eval"
        ].clear()  # means over batches, with the rows that fill them up; `RewardMetrics` has exact ones
        super().log(logs, start_time)
        self._tell_constant()

    def _tell_constant(self) -> None:
        """Give notice of a reward that has been the same for all completions of the first reports."""
        if not self.accelerator.is_main_process:
            return
        reports = [entry for entry in self.state.log_history if f"rewards/{self.names[0]}/std" in entry]
        if len(reports) < min(FIRST_REPORTS, self.state.max_steps):
            return
        for name in self.names:
            means = {entry[f"rewards/{name}/mean"] for entry in reports[:FIRST_REPORTS]}
            spread = max(entry[f"rewards/{name}/std"] or 0.0 for entry in reports[:FIRST_REPORTS])
            if name not in self._told and len(means) == 1 and spread == 0:
                self._told.add(name)
                notice(
                    f"{REWARDS}: {name} was {means.pop():g} for each completion of the first {len(reports)} reports,"
                    " and nothing is learnt from it. Look at what the model writes, or choose a reward that differs"
                    " earlier"
                )


class RewardMetrics:
    """Computes the metrics of an evaluation, each a mean over all completions of the held-out prompts.

    evalLoss is what the training lowers: beta times the KL, minus the reward.
    """

    def __init__(self, spec: FineTuneJobSpec, names: Sequence[str]) -> None:
        self.spec, self.names = spec, names
        self.rows: list[torch.Tensor] = []

    def __call__(self, gathered: Any, compute_result: bool) -> dict[str, float]:
        self.rows.append(gathered.predictions)
        if not compute_result:
            return {}
        rows, self.rows = torch.cat(self.rows), []
        rewards, (lengths, cut, kl) = rows[:, : len(self.names)], rows[:, len(self.names) :].unbind(dim=1)
        weights = torch.tensor([reward.weight for reward in self.spec.grpo.rewards], dtype=rows.dtype)
        summed = rewards @ weights.to(rows.device)
        groups = summed.view(-1, self.spec.grpo.generations)
        beta = self.spec.grpo.beta
        metrics = {
            "loss": (beta * kl - summed).mean(),
            "reward": summed.mean(),
            "rewardStd": summed.std(),
            "completionLength": lengths.mean(),
            "clippedShare": cut.mean(),
            "zeroVarianceShare": (groups.max(dim=1)[0] == groups.min(dim=1)[0]).double().mean(),
        }
        metrics |= {f"reward.{name}": rewards[:, i].mean() for i, name in enumerate(self.names)}
        metrics |= {"kl": kl.mean()} if beta else {}
        return {name: value.item() for name, value in metrics.items()}
