"""Whether outputs are exactly what they should be, for everything that there is: `make exactness`, about 20 minutes on
two cores.

Architectures: texts in batches equal to transformers' own, one text at a time without padding. Samplers: the same image
files from permuted rows and from one, two and three shards. Kills: a shard killed at random moments ends with the files
of one that was not. `make test` has a sample of each.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

os.environ["OMP_NUM_THREADS"] = "1"  # sums are split over threads, and so rounded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPTS = ["An object", "is", "The object is at the object in the object on the", "one two three four five six seven"]
ROWS = [
    {"prompt": f"{thing} in the workshop", "seed": i}
    for i, thing in enumerate(("a lute", "an oud", "a theorbo", "a cittern", "a viol", "a rebec"))
]
PERMUTED = [3, 0, 5, 1, 4, 2]
IMAGE = {"width": 32, "height": 32, "steps": 4}
KILLS = 50


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="luthier-exactness-") as folder:
        root = Path(folder)
        os.environ |= {
            "LUTHIER_RUN_DIR": str(root),
            "LUTHIER_TERMINATION_LOG": str(root / "termination-log"),
            "HF_HUB_OFFLINE": "1",
        }
        return {"architectures": all_architectures(root), "samplers": samplers(root), "kills": kills(root)}


def all_architectures(root: Path) -> dict[str, Any]:
    """Each architecture of transformers: equal or different, and which prompts shared a batch; or why it could not be
    tried.
    """
    from trainer.architectures import architectures

    sharing: dict[str, list[str]] = {}
    different, unbuilt = list[str](), dict[str, str]()
    for kind in architectures():
        try:
            equal, shared = compare(kind, root / kind)
        except Exception as error:  # each architecture has its own ways to refuse small sizes
            unbuilt[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        sharing.setdefault(shared, []).append(kind)
        if not equal:
            different.append(kind)
    tried = sum(map(len, sharing.values()))
    special = {shared: kinds for shared, kinds in sharing.items() if shared != "slots apart"}
    return {
        "tried": tried,
        "equal": tried - len(different),
        "different": different,
        "sharing": special,
        "notTried": unbuilt,
    }


def compare(kind: str, folder: Path) -> tuple[bool, str]:
    """Whether our texts are those of transformers, and which prompts shared a batch."""
    from trainer.architectures import NEW_TOKENS, alone, engine_of, save_tiny, texts

    model = save_tiny(kind, folder)
    engine = engine_of(folder, batch_size=2)
    return texts(engine, PROMPTS) == [
        alone(model, engine.tokenizer, prompt, NEW_TOKENS) for prompt in PROMPTS
    ], engine.sharing


def samplers(root: Path) -> dict[str, Any]:
    """Each sampler: whether rows in another order and over more shards have the same digests."""
    from trainer.small_sdxl import write_small_sdxl

    from luthier_api.samplers import SchedulerName

    model = write_small_sdxl(root / "sdxl")
    names, different = list(get_args(SchedulerName)), list[str]()
    for name in names:
        expect = digests(root / f"{name}-1", model, ROWS, name)
        others = [digests(root / f"{name}-p", model, [ROWS[i] for i in PERMUTED], name)]
        others += [digests(root / f"{name}-{shards}", model, ROWS, name, shards) for shards in (2, 3)]
        different += [name] * any(other != expect for other in others)
    return {"tried": len(names), "equal": len(names) - len(different), "different": different}


def digests(workspace: Path, model: Path, rows: list[dict[str, Any]], sampler: str, shards: int = 1) -> dict[str, str]:
    """Prompt → SHA-256 of its image file."""
    import pytest
    from trainer.generating import generate_run, generate_shards, result_lines

    run = generate_run(
        workspace,
        rows,
        task="text-to-image",
        model={"path": str(model)},
        image=IMAGE | {"scheduler": sampler},
        batchSize=2,
        shards=shards,
    )
    with pytest.MonkeyPatch.context() as patch:
        generate_shards(run, patch)
    return {line["prompt"]: line["sha256"] for line in result_lines(run)}


def kills(root: Path) -> dict[str, Any]:
    """A shard that is killed again and again until `KILLS` kills have hit it, against one that is left alone."""
    from trainer.generating import generate_run, prepare_by_hand, result_lines

    from luthier_api.workspace import WorkspaceFolder

    settings: dict[str, Any] = {
        "task": "text-to-image",
        "model": {"path": str(root / "sdxl")},
        "image": IMAGE | {"scheduler": "euler-ancestral", "perPrompt": 20},
        "batchSize": 2,
    }
    moments, done, equal, at = random.Random(5), 0, 0, Counter[int]()
    whole = generate_run(root / "whole", ROWS, **settings)
    prepare_by_hand(whole)
    start(whole, root).wait()
    expect = [line["sha256"] for line in result_lines(whole)]
    rounds = 0
    while done < KILLS:
        rounds += 1
        run = generate_run(root / f"killed-{rounds}", ROWS, **settings)
        prepare_by_hand(run)
        ledger = WorkspaceFolder(Path(run.workspace)).shards / "shard-00000-of-00001.jsonl"
        finished = False
        while not finished:
            process = start(run, root)
            # A kill at the start of each line, and somewhere in the work that follows it.
            lines = count(ledger) + 2 * moments.randrange(1, 12)
            while process.poll() is None and (done == KILLS or count(ledger) < lines):
                time.sleep(0.002)
            time.sleep(moments.random() * 0.05)
            finished = process.poll() is not None
            if not finished:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                at[count(ledger)] += 1
        equal += [line["sha256"] for line in result_lines(run)] == expect
    return {"kills": done, "jobs": rounds, "equalJobs": equal, "differentMoments": len(at)}


def start(run: Any, root: Path) -> subprocess.Popen[bytes]:
    """The process that the supervisor would start."""
    config = root / f"{Path(run.workspace).name}.json"
    config.write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    environment = os.environ | {"LUTHIER_RUN": str(config), "LUTHIER_NODE_RANK": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "luthier_trainer.worker", "generate"], env=environment, stdout=subprocess.DEVNULL
    )


def count(ledger: Path) -> int:
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0
