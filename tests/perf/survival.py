"""Whether trainings survive: `PYTHONPATH=tests python -m perf survival`, about 20 minutes on two cores.

Stops: two pods of one training get SIGTERM up to a second apart, in steps, saves and evaluations and before the first
step. Both have to leave with 75 at one step. Kills: a training is killed with SIGKILL at random moments, and each
attempt has to go on from the newest checkpoint whose files match its manifest; the last one ends with the weights of a
training that nobody killed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # sums are split over threads, and so rounded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STOPS, KILLS = 20, 50
SKEW_SECONDS = 1.0
PATIENCE = 120  # seconds from the last SIGTERM to the end of a pod: more is a hang
START_SECONDS = 240  # until the first step, on a machine that has other things to do
KILLED_STEPS = 60
BEGINNING = re.compile(r"from the beginning$|resuming from (checkpoint-\d+)$", re.M)
"""The end of the line with which an attempt begins."""
MOMENTS: dict[str, dict[str, Any]] = {
    "a step": {},
    "a save": {"saveSteps": 1},
    "an evaluation": {"evalSteps": 1},
    "before the first step": {},
}
"""What most of the time of a run goes to when it is told to stop → settings by which it does."""


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="luthier-survival-") as folder:
        root = Path(folder)
        os.environ |= {"LUTHIER_RUN_DIR": str(root), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        model, data = inputs(root)
        return {"stops": stops(root, model, data), "kills": kills(root, model, data)}


def inputs(root: Path) -> tuple[Path, Any]:
    """(a small Llama, rows for it)"""
    from pydoc_data.topics import topics

    from prepared_workspace import causal_lm_data, prose, save_llama
    from transformers import AutoTokenizer

    blocks = "\n\n".join(text for _, text in sorted(topics.items())).split("\n\n")
    paragraphs = [block.strip() for block in blocks if len(block.strip()) > 40]
    model = save_llama(root / "llama", paragraphs)
    return model, causal_lm_data(AutoTokenizer.from_pretrained(model), prose(paragraphs))


# ---- stops


def stops(root: Path, model: Path, data: Any) -> dict[str, Any]:
    random_numbers, found = random.Random(7), list[dict[str, Any]]()
    for number in range(STOPS):
        moment = [*MOMENTS][number % len(MOMENTS)]
        found.append(stop(root / f"stop-{number}", model, data, moment, random_numbers))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    good = [each for each in found if each["codes"] == [75, 75] and each["oneStep"]]
    return {
        "runs": len(found),
        "agreed": len(good),
        "longestSeconds": max(each["seconds"] for each in found),
        "moments": Counter(each["moment"] for each in good),
        "others": [each for each in found if each not in good],
    }


def stop(root: Path, model: Path, data: Any, moment: str, numbers: random.Random) -> dict[str, Any]:
    """Start both pods, send each a SIGTERM, and say how they ended."""
    from prepared_workspace import prepared_run

    from luthier_api.termination import TerminationMessage

    training = {"maxSteps": 100_000, "logSteps": 1, "saveSteps": 100_000} | MOMENTS[moment]
    run = prepared_run(
        root / "job", model, data, port=free_port(), method={"type": "lora"}, resources={"nodes": 2}, training=training
    )
    (root / "run.json").write_text(json.dumps(run.dump()))
    with ExitStack() as logs:
        pods = [start(root, node, logs) for node in (0, 1)]
        if moment == "before the first step":
            time.sleep(numbers.uniform(0, 12))
        else:
            until = time.monotonic() + START_SECONDS
            while "step 2/" not in (root / "pod-0/log").read_text() and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(numbers.uniform(0, 1))
        skew, first = numbers.uniform(0, SKEW_SECONDS), numbers.randrange(2)
        pods[first].send_signal(signal.SIGTERM)
        time.sleep(skew)
        pods[1 - first].send_signal(signal.SIGTERM)
        began = time.monotonic()
        codes = [wait(pod) for pod in pods]
    messages = [TerminationMessage.read(file.read_text()) for file in sorted(root.glob("pod-*/termination-log"))]
    steps = {(each.step, each.saved) for each in messages if each is not None}
    return {
        "moment": moment,
        "skew": round(skew, 2),
        "codes": codes,
        "oneStep": len(steps) == 1 and len(messages) == len(pods),
        "step": [each and each.step for each in messages],
        "messages": [each and each.message for each in messages],
        "seconds": round(time.monotonic() - began, 1),
    }


def start(root: Path, node: int, logs: ExitStack) -> subprocess.Popen[bytes]:
    """The supervisor of a pod."""
    folder = root / f"pod-{node}"
    folder.mkdir()
    environment = os.environ | {
        "LUTHIER_RUN_DIR": str(folder),
        "LUTHIER_TERMINATION_LOG": str(folder / "termination-log"),
        "LUTHIER_NODE_RANK": str(node),
    }
    command = [sys.executable, "-m", "luthier_trainer", "train", "--run", str(root / "run.json")]
    log = logs.enter_context((folder / "log").open("w"))
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait(pod: subprocess.Popen[bytes]) -> int | str:
    try:
        return pod.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pod.kill()
        pod.wait()
        return "hangs"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ---- kills


def kills(root: Path, model: Path, data: Any) -> dict[str, Any]:
    """A training of many short attempts. Its processes are forked, because imports would take most of their time."""
    from luthier_trainer.training import main as train  # before the first fork

    moments, done, resumed, equal, trainings = random.Random(11), 0, 0, 0, 0
    newest_steps = list[int]()
    whole = killed_run(root / "unkilled", model, data)
    attempt(train, whole, root / "unkilled/log").join()
    expect = weights(whole)
    pace = time.monotonic()
    attempt(train, killed_run(root / "pace", model, data), root / "pace/log").join()
    longest = time.monotonic() - pace
    while done < KILLS:
        run, finished = killed_run(root / f"killed-{trainings}", model, data), False
        trainings += 1
        while not finished:
            found = newest(Path(run.workspace) / "checkpoints")
            log = Path(run.workspace).parent / "log"
            process = attempt(train, run, log)
            if done < KILLS:
                process.join(moments.uniform(0, longest))
            else:
                process.join()
            finished = process.exitcode is not None
            if not finished:
                process.kill()
                process.join()
                done += 1
            began = BEGINNING.search(log.read_text())
            if began is not None:
                resumed += began[1] == found
                newest_steps.append(int(found.rpartition("-")[2]) if found else 0)
        equal += weights(run) == expect
    return {
        "kills": done,
        "attemptsThatBegan": len(newest_steps),
        "fromTheNewestThatVerifies": resumed,
        "trainings": trainings,
        "equalTrainings": equal,
        "differentSteps": len(set(newest_steps)),
    }


def killed_run(root: Path, model: Path, data: Any) -> Any:
    from prepared_workspace import prepared_run

    root.mkdir()
    training = {"maxSteps": KILLED_STEPS, "saveSteps": 1, "learningRate": 1e-2}
    return prepared_run(
        root / "job", model, data, method={"type": "lora", "rank": 4, "dropout": 0.1}, training=training
    )


def attempt(train: Any, run: Any, log: Path) -> Any:
    """A process that trains, and whose output is `log`."""

    def work() -> None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        train.main(run)
        sys.stdout.flush()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def newest(folder: Path) -> str | None:
    """The newest checkpoint whose files have the digests of its manifest."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    return next((path.name for path in found if verifies(path)), None)


def verifies(checkpoint: Path) -> bool:
    manifest = checkpoint / "MANIFEST.json"
    if not manifest.exists():
        return False
    entries = json.loads(manifest.read_text())["files"]
    return all(
        hashlib.sha256((checkpoint / entry["path"]).read_bytes()).hexdigest() == entry["sha256"] for entry in entries
    )


def weights(run: Any) -> str:
    """The digest of the result's weights."""
    return hashlib.sha256((Path(run.workspace) / "result/adapter_model.safetensors").read_bytes()).hexdigest()
