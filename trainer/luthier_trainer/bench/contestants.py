"""The programs that are compared: `python -m luthier_trainer.bench.contestants NAME RUN COURSE`, each in a process.

`ours` is the process of a pod of `run`. The others are what one writes after reading the documentation of the
libraries: the same rows in the same order, the same model, batches and precision.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier_api.run import FineTuneRun, PreparedRecord, read_run
from luthier_trainer.bench.rounds import Course
from luthier_trainer.workspace.prepared import read_prepared


def ours(run: FineTuneRun, prepared: PreparedRecord) -> Callable[[Any], None]:
    """Return the training that a pod does."""
    from luthier_trainer.worker import load

    load("train", run)
    from luthier_trainer.training import main as training

    def train(measuring: Any) -> None:
        training.main(run, observers=[measuring])

    return train


def plain(run: FineTuneRun, prepared: PreparedRecord) -> Callable[[Any], None]:
    """Return a training by transformers' Trainer and PEFT."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def train(measuring: Any) -> None:
        tokenizer = AutoTokenizer.from_pretrained(prepared.model_path)
        Trainer(
            model=adapted(run, prepared),
            args=TrainingArguments(**arguments(run, prepared)),
            train_dataset=labelled(load_from_disk(prepared.dataset_path)["train"]).select_columns(
                ["input_ids", "labels"]
            ),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[measuring],
        ).train()

    return train


def trl(run: FineTuneRun, prepared: PreparedRecord) -> Callable[[Any], None]:
    """Return a training by TRL's SFTTrainer, on the bins of `prepare` where rows are packed."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def train(measuring: Any) -> None:
        rows = load_from_disk(prepared.dataset_path)["train"]
        packed, masked = ("seq_lengths" in rows.column_names, "loss_mask" in rows.column_names)
        names = ["input_ids", *(["seq_lengths"] if packed else []), *(["labels"] if masked else [])]
        config = SFTConfig(
            **arguments(run, prepared),
            dataset_kwargs={"skip_prepare_dataset": True},
            padding_free=packed,
            max_length=None if packed else run.spec.training.max_length,
        )
        SFTTrainer(
            model=base_model(run, prepared),
            args=config,
            train_dataset=(labelled(rows) if masked else rows).select_columns(names),
            processing_class=AutoTokenizer.from_pretrained(prepared.model_path),
            peft_config=lora(run),
            callbacks=[measuring],
        ).train()

    return train


CONTESTANTS: Mapping[str, Callable[[FineTuneRun, PreparedRecord], Callable[[Any], None]]] = {
    "ours": ours,
    "plain": plain,
    "trl": trl,
}
DESCRIBED = {
    "plain": "transformers.Trainer with PEFT and DataCollatorForSeq2Seq",
    "trl": "trl.SFTTrainer with PEFT; padding_free on the same bins where rows are packed",
}
"""What a peer is, for the reader of the figures."""


def arguments(run: FineTuneRun, prepared: PreparedRecord) -> dict[str, Any]:
    """Return the arguments of TrainingArguments for the course of the job."""
    training, plan = run.spec.training, prepared.plan
    cpu = run.spec.resources.gpus_per_node == 0
    return {
        "output_dir": tempfile.mkdtemp(dir=run.workspace),
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps or 1,
        "gradient_checkpointing": bool(plan.gradient_checkpointing),
        "learning_rate": training.learning_rate,
        "seed": training.seed,
        "logging_steps": training.log_steps,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": cpu,
        "bf16": not cpu,
        "disable_tqdm": True,
    }


def labelled(rows: Any) -> Any:
    """Return the rows with `labels`: the tokens that are learnt, and -100 for the others."""
    if "loss_mask" not in rows.column_names:
        return rows.add_column("labels", rows["input_ids"][:])
    pairs = zip(rows["input_ids"], rows["loss_mask"], strict=True)
    labels = [[token if learnt else -100 for token, learnt in zip(*pair, strict=True)] for pair in pairs]
    return rows.add_column("labels", labels)


def base_model(run: FineTuneRun, prepared: PreparedRecord) -> Any:
    """Return the model as its page on the Hub says to load it: in the type of its files, quantised for QLoRA."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    set_seed(run.spec.training.seed)
    options: dict[str, Any] = {"dtype": "auto"}
    if run.spec.resources.gpus_per_node:
        options["device_map"] = {"": 0}
    if run.spec.model.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(prepared.model_path, **options)


def lora(run: FineTuneRun) -> Any:
    """Return the adapters of the job; None where all weights learn."""
    from peft import LoraConfig

    method = run.spec.method
    if method.type == "full":
        return None
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def adapted(run: FineTuneRun, prepared: PreparedRecord) -> Any:
    """Return the model with the adapters of the job, as PEFT's guides put them on it."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    model, config = base_model(run, prepared), lora(run)
    if config is None:
        return model
    if run.spec.model.quantization:
        model = prepare_model_for_kbit_training(model)
    elif prepared.plan.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, config)


def main(name: str, run_file: str, course_text: str) -> None:
    """Train as the program `name`, and report to the command that started it."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    run = read_run(Path(run_file).read_bytes())
    assert isinstance(run, FineTuneRun), "the command makes no other"
    train = CONTESTANTS[name](run, read_prepared(run))
    from luthier_trainer.bench.measuring import Channel, Measuring

    channel = Channel(output, sys.stdin)
    measuring = Measuring(channel, Course(**json.loads(course_text)))
    channel.send("ready")
    channel.wait()
    try:
        train(measuring)
    except BaseException as error:
        traceback.print_exc()
        channel.send("failed", message=f"{type(error).__name__}: {error}"[:600])
        os._exit(1)
    channel.send("failed", message="the training ended before the last block was measured")
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
