"""Our trainer against a plain script with transformers' Trainer and PEFT: CPU seconds a step, and the losses.

`python tests/perf/training.py` runs both on the same model, data and arguments (LoRA, causal LM) and prints one JSON
document. CPU time (user + system) is read in the process between two steps, so start-up does not count.

Both run at the same time, each on one core of its own, and change cores from round to round: what slows the machine
down, slows both. One after the other, two runs of the same program differ by up to 8 % here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS, FROM_STEP = 60, 10
ROUNDS = 6
BATCH, LENGTH, LEARNING_RATE, SEED, LOG_STEPS, RANK = 8, 128, 1e-3, 42, 5, 8
LIMIT = 1.03


def prepare(root: Path, **spec: Any) -> Any:
    """A Llama of 2.6 million weights, 512 rows of 128 tokens, and the run config over them; keywords replace fields of
    its spec.
    """
    from datasets import Dataset, DatasetDict
    from prepared_workspace import prepared_run

    from luthier_api.spec import NewModel
    from luthier_trainer.models.new_model import new_config, save_new_model, train_tokenizer

    text = "\n\n".join(body for _, body in sorted(topics.items()))
    tokenizer = train_tokenizer(text.split("\n\n"), 2048)
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
    }
    save_new_model(
        new_config(NewModel(model_type="llama", vocab_size=2048, parameters=sizes), tokenizer),
        root / "model",
        seed=SEED,
    )
    tokenizer.save_pretrained(root / "model")
    tokens = tokenizer(text)["input_ids"]
    # Rows of unequal length, so that both pad.
    rows = [tokens[i * LENGTH : (i + 1) * LENGTH - i % 16] for i in range(512)]
    data = DatasetDict(train=Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]}))
    return prepared_run(
        root / "job",
        root / "model",
        data,
        method={"type": "lora", "rank": RANK, "alpha": 2 * RANK},
        training={
            "maxSteps": STEPS,
            "batchSize": BATCH,
            "learningRate": LEARNING_RATE,
            "seed": SEED,
            "logSteps": LOG_STEPS,
            "saveSteps": 10_000,
            "maxLength": LENGTH,
        },
        **spec,
    )


def measuring(base: type) -> type:
    """The callback `base`, which also notes this process's CPU time after FROM_STEP and after STEPS, and the losses."""

    class Measuring(base):  # type: ignore[misc]
        figures: dict[str, Any] = {"losses": []}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == FROM_STEP:
                self.figures["cpu"] = -time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == STEPS:
                self.figures["cpu"] += time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.figures["losses"].append(logs["loss"])

    return Measuring


def ours(root: Path) -> dict[str, Any]:
    """The very process that a pod starts, with one callback that measures."""
    from luthier_api.run import read_run
    from luthier_trainer.training import main as train

    train.Heartbeat = measuring(train.Heartbeat)  # type: ignore[misc]
    train.main(read_run((root / "run.json").read_bytes()))
    return train.Heartbeat.figures  # type: ignore[attr-defined,no-any-return]


def plain(root: Path) -> dict[str, Any]:
    """What one writes after reading the documentation of transformers and PEFT."""
    from datasets import load_from_disk
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    set_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    callback = measuring(TrainerCallback)
    rows = load_from_disk(str(root / "job/prepared/dataset"))["train"]
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(dir=root),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            seed=SEED,
            logging_steps=LOG_STEPS,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows.add_column("labels", rows["input_ids"][:]),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(root / "model")),
        callbacks=[callback()],
    ).train()
    return callback.figures  # type: ignore[attr-defined,no-any-return]


def start(which: str, root: Path, core: int) -> subprocess.Popen[str]:
    """One run in a process of its own, on one core."""
    variables = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "LUTHIER_RUN_DIR": str(root / "run"),
    }
    return subprocess.Popen(
        [sys.executable, __file__, which, str(root), str(core)],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
    )


def figures_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run printed last.

    Raises:
        subprocess.CalledProcessError: The run failed; its messages stand on stderr.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def main() -> dict[str, Any]:
    """Both at once, ROUNDS times.

    Raises:
        subprocess.CalledProcessError: A run failed.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "run").mkdir()
        (root / "run.json").write_text(json.dumps(prepare(root).dump()))
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
        for _ in range(ROUNDS):
            cores.reverse()
            pair = {which: start(which, root, core) for which, core in zip(runs, cores, strict=True)}
            for which, process in pair.items():
                runs[which].append(figures_of(process))
            # A finished run would not be repeated.
            for name in ("result", "checkpoints"):
                (root / "job" / name).rename(root / f"{name}-{time.monotonic_ns()}")
    seconds = {which: [round(run["cpu"] / (STEPS - FROM_STEP), 5) for run in runs[which]] for which in runs}
    ratios = [o / p for o, p in zip(seconds["ours"], seconds["plain"], strict=True)]
    differences = [abs(o - p) for o, p in zip(runs["ours"][0]["losses"], runs["plain"][0]["losses"], strict=True)]
    return {
        "steps": STEPS - FROM_STEP,
        "cpu_seconds_per_step": seconds,
        "ratios": [round(r, 4) for r in ratios],
        "ratio": round(statistics.median(ratios), 4),
        "ratio_of_best": round(min(seconds["ours"]) / min(seconds["plain"]), 4),
        "limit": LIMIT,
        "largest_loss_difference": max(differences),
        "losses": [round(loss, 4) for loss in runs["ours"][0]["losses"]],
    }


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(main()))
    else:
        os.sched_setaffinity(0, {int(sys.argv[3])})
        figures = {"ours": ours, "plain": plain}[sys.argv[1]](Path(sys.argv[2]))
        print()
        print(json.dumps(figures), flush=True)
        os._exit(0)  # the metrics server of ours has a thread
