"""Packed training: ours against TRL's `SFTTrainer(packing=True)`, CPU seconds for a thousand real tokens.

`PYTHONPATH=tests python -m perf packing` runs both on the same model and texts (LoRA, causal LM), at once, each on a
core of its own, and changes the cores from round to round. It prints one JSON document. Both pack by best fit, and
isolate the texts with torch's scaled dot-product attention. Ours keeps the bins as rows of a batch. TRL makes one row
of all bins of a batch, whose mask is as many times larger.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perf import training

ROUNDS, BATCH, LENGTH = 2, 4, 512
TEXTS = 3000


def prepare(root: Path) -> Any:
    """The model of the benchmark `training`, bins of texts of 8 to 512 tokens, and the run config over them."""
    import numpy
    from datasets import Dataset, DatasetDict, Features, List, Value
    from prepared_workspace import prepared_run
    from transformers import AutoTokenizer

    from luthier_trainer.data.bins import packed

    training.LENGTH = LENGTH
    training.prepare(root)
    tokens = AutoTokenizer.from_pretrained(root / "model")("\n".join(training.topics.values()))["input_ids"]
    random = numpy.random.default_rng(0)
    lengths = random.lognormal(4.0, 0.8, TEXTS).clip(8, LENGTH).astype(int).tolist()
    begins = random.integers(0, len(tokens) - LENGTH, TEXTS).tolist()
    rows = [tokens[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]
    types = Features({"input_ids": List(Value("int32")), "length": Value("int32")})
    texts = Dataset.from_dict({"input_ids": rows, "length": lengths}, features=types)
    texts.save_to_disk(root / "texts")
    return prepared_run(
        root / "packed",
        root / "model",
        DatasetDict(train=packed(texts, LENGTH, "training")),
        method={"type": "lora", "rank": training.RANK, "alpha": 2 * training.RANK},
        training={
            "maxSteps": training.STEPS,
            "batchSize": BATCH,
            "logSteps": training.LOG_STEPS,
            "saveSteps": 10_000,
            "maxLength": LENGTH,
            "packing": "isolated",
        },
    )


def theirs(root: Path) -> dict[str, Any]:
    """What one writes after reading the documentation of TRL."""
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    callback = training.measuring(TrainerCallback)
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(root / "model"),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(dir=root),
            max_steps=training.STEPS,
            per_device_train_batch_size=BATCH,
            logging_steps=training.LOG_STEPS,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # ours does not recompute on CPU
            disable_tqdm=True,
            packing=True,
            max_length=LENGTH,
        ),
        train_dataset=load_from_disk(str(root / "texts")).select_columns(["input_ids"]),
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
        peft_config=LoraConfig(
            r=training.RANK, lora_alpha=2 * training.RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[callback()],
    ).train()
    return callback.figures  # type: ignore[attr-defined,no-any-return]


def start(which: str, root: Path, core: int) -> subprocess.Popen[str]:
    """One run in a process of its own, on one core."""
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LUTHIER_RUN_DIR": str(root / "run")}
    command = [sys.executable, __file__, which, str(root), str(core)]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)


def main() -> dict[str, Any]:
    """Both at once, ROUNDS times.

    Raises:
        subprocess.CalledProcessError: A run failed.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "run").mkdir()
        with contextlib.redirect_stdout(sys.stderr):  # notices
            (root / "run.json").write_text(json.dumps(prepare(root).dump()))
        seconds: dict[str, list[float]] = {"ours": [], "trl": []}
        for _ in range(ROUNDS):
            cores.reverse()
            pair = {which: start(which, root, core) for which, core in zip(seconds, cores, strict=True)}
            for which, process in pair.items():
                seconds[which].append(training.figures_of(process)["cpu"])
            for name in ("result", "checkpoints"):  # a finished run would not be repeated
                (root / "packed" / name).rename(root / f"{name}-{len(seconds['ours'])}")
    # Nearly all bins are full, so that both compute the same number of tokens.
    tokens = (training.STEPS - training.FROM_STEP) * BATCH * LENGTH / 1000
    per_thousand = {which: [round(value / tokens, 4) for value in values] for which, values in seconds.items()}
    ratios = [o / t for o, t in zip(seconds["ours"], seconds["trl"], strict=True)]
    return {
        "batch": BATCH,
        "maxLength": LENGTH,
        "cpu_seconds_per_1000_tokens": per_thousand,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 4),
    }


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[3])})
    figures = {"ours": training.ours, "trl": theirs}[sys.argv[1]](Path(sys.argv[2]))
    print()
    print(json.dumps(figures), flush=True)
    os._exit(0)  # the metrics server of ours has a thread
