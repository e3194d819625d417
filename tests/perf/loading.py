"""What the processes of a pod hold of a model of 1.1 B weights: while they load it, train one step of it, and save it.

The model is in bf16, in files of 500 MB, which are also written that large. Of all its weights one block learns, or an
adapter, so that the states of the optimiser are small beside the weights. Counted is the memory that the kernel cannot
take back: pages of the files that are being read are not in it. The parent process looks every few milliseconds, so
that the processes are not disturbed. In the end the frozen weights of the result are compared with those of the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.variables import Variables
from luthier_trainer.bench.rounds import prepare
from luthier_trainer.distributed import launch

EVERY = 0.005  # seconds
SECONDS = 1800  # of a training, or of `prepare`, at most
MIB = 1 << 20
CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
FILE_BYTES = 500_000_000
MARKS = "marks-{rank}.json"  # which `perf.loading_rank` writes


@dataclass(frozen=True)
class Case:
    name: str
    processes: int
    strategy: str = "auto"
    method: dict[str, Any] = field(default_factory=dict)


BLOCK = {"type": "full", "layers": [0], "freeze": ["embed_tokens", "lm_head", "model.norm"]}
LEARNS = "model.layers.0."
LORA = {"type": "lora", "rank": 4}
CASES = [
    Case(name="one process, one block learns", processes=1, method=BLOCK),
    Case(name="ddp, adapter", processes=2, strategy="ddp", method=LORA),
    Case(name="zero3, one block learns", processes=2, strategy="zero3", method=BLOCK),
    Case(name="zero3, adapter", processes=2, strategy="zero3", method=LORA),
    Case(name="fsdp, one block learns", processes=2, strategy="fsdp", method=BLOCK),
    Case(name="fsdp, adapter", processes=2, strategy="fsdp", method=LORA),
]


def write_model(folder: str) -> None:
    """Write a model with random weights in bf16, and its tokenizer."""
    import numpy
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from luthier_trainer.bench.cases import SEED, VOCABULARY, words
    from luthier_trainer.models.new_tokenizer import train_tokenizer

    random = numpy.random.default_rng(SEED)
    tokenizer = train_tokenizer((words(random, 100) for _ in range(200)), VOCABULARY)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **CONFIG), dtype=torch.bfloat16
    )
    model.save_pretrained(folder, max_shard_size=FILE_BYTES)
    tokenizer.save_pretrained(folder)


def run_of(case: Case, root: Path, model: Path) -> FineTuneRun:
    root.mkdir(parents=True)
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": f"one two three {i}"}) + "\n" for i in range(4)))
    spec = {
        "task": "causal-lm",
        "model": {"path": str(model)},
        "dataset": {"files": [str(root / "rows.jsonl")]},
        "method": case.method,
        "training": {"maxSteps": 1, "batchSize": 2, "maxLength": 16, "precision": "bf16", "saveEvery": "epoch"},
        "strategy": case.strategy,
        "resources": {"gpusPerNode": 0, "processesPerNode": case.processes},
    }
    return FineTuneRun.model_validate(
        {"name": "loading", "workspace": str(root / "job"), "metricsPort": 0, "spec": spec}
    )


def held(pid: int) -> tuple[int, int]:
    """Return (bytes that only this process can give up, bytes of files that it has mapped)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return found.get("RssAnon", 0) + found.get("RssShmem", 0), found.get("RssFile", 0)


def measured(case: Case, root: Path, model: Path) -> dict[str, Any]:
    run = run_of(case, root, model)
    record = prepare(run, root, time.monotonic() + SECONDS)
    samples = trained(run, record, root)
    documents = [json.loads((root / MARKS.format(rank=rank)).read_text()) for rank in range(case.processes)]
    marks = {document["pid"]: document["ended"] for document in documents}
    ended = {name: max(each[name] for each in marks.values()) for name in next(iter(marks.values()))}
    begin, phases = 0.0, {}
    for name, end in ended.items():
        within = [sample for at, sample in samples if begin < at <= end]
        begin = end
        phases[name] = {
            "ranksMiB": [max(sample.get(pid, (0, 0))[0] for sample in within) // MIB for pid in marks],
            "podMiB": max(sum(own for own, _ in sample.values()) for sample in within) // MIB,
            "filesMiB": [max(sample.get(pid, (0, 0))[1] for sample in within) // MIB for pid in marks],
        }
    if case.method == BLOCK and (changed := changed_weights(model, root / "job/result")):
        raise SystemExit(f"{case.name}: {len(changed)} frozen weights have changed, among them {changed[0]}")
    peak = max(phase["podMiB"] for phase in phases.values())
    memory = record.plan.memory
    planned = memory.host_bytes // MIB if memory else 0
    loaded = [document["loaded"] // MIB for document in documents]
    return {
        "phases": phases,
        "loadedMiB": loaded,
        "peakMiB": peak,
        "plannedMiB": planned,
        "ratio": round(peak / planned, 2),
    }


def changed_weights(model: Path, result: Path) -> list[str]:
    """Return the frozen weights that are not in the result as they are in the model, bit by bit."""
    found = {name: weight for file in result.glob("*.safetensors") for name, weight in load_file(file).items()}
    given = {name: weight for file in model.glob("*.safetensors") for name, weight in load_file(file).items()}
    frozen = [name for name in given if not name.startswith(LEARNS)]
    return [name for name in frozen if name not in found or not found[name].equal(given[name])]


def trained(run: FineTuneRun, record: PreparedRecord, root: Path) -> list[tuple[float, dict[int, tuple[int, int]]]]:
    """Train, and return what each process held from time to time."""
    os.environ[Variables.RUN_DIR] = str(root)
    os.environ[Variables.RUN] = str(root / "run.json")
    launch.MODULE = "perf.loading_rank"
    command = launch.command(run, record, 0)
    tests = str(Path(__file__).resolve().parents[1])
    environment = os.environ | launch.environment(run, record, 0) | {"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    samples: list[tuple[float, dict[int, tuple[int, int]]]] = []
    deadline, looked, processes = time.monotonic() + SECONDS, 0.0, list[psutil.Process]()
    with (root / "log").open("w") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while started.poll() is None and time.monotonic() < deadline:
            if time.monotonic() - looked > 0.2:
                looked = time.monotonic()
                top = psutil.Process(started.pid)
                processes = [top, *top.children(recursive=True)]
            samples.append((time.monotonic(), {process.pid: held(process.pid) for process in processes}))
            time.sleep(EVERY)
        if started.poll() != 0:
            started.kill()
            raise SystemExit(f"{root.name}: {(root / 'log').read_text()[-3000:]}")
    return samples


def main(*names: str) -> dict[str, Any]:
    """Measure the cases of these names, or all of them."""
    cases = [case for case in CASES if case.name in names or not names]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        code = f"from perf.loading import write_model; write_model({str(root / 'model')!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
        return {case.name: measured(case, root / str(number), root / "model") for number, case in enumerate(cases)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:]), indent=1))
