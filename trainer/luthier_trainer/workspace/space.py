"""How much of the workspace a job needs, and how long a save takes: one function a term, in bytes and seconds. Imports
no torch.

A checkpoint holds what training goes on from: weights, the optimizer's state, and beside them tokenizer, random states
and history. transformers and DeepSpeed decide what that is for each strategy; tests compare these sums with the files
that they write.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.generate import GenerateJobSpec
from luthier_api.outputs import LINES
from luthier_api.run import Weights
from luthier_api.status import Plan
from luthier_api.tasks import GENERATION_TASKS
from luthier_api.training import Training
from luthier_trainer.distributed.strategy import FSDP, ZERO_STAGE
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.course import most_saves

if TYPE_CHECKING:
    from datasets import Dataset

FP32 = 4
TENSOR_BYTES = 700  # names, alignment and a step counter for each tensor in a checkpoint; 500 to 900 seen
RANK_BYTES = 15_000  # random states of Python, NumPy and torch
HISTORY_BYTES = 50_000  # trainer_state.json of a few hundred reports
# What a volume takes from all nodes together: gp3 of AWS has 125 MB/s unless more is ordered, a balanced persistent
# disk of Google's about 240, an NFS server on 10 GbE up to 1,100.
WRITE_BYTES_PER_SECOND = 200e6
HASH_BYTES_PER_SECOND = 1e9  # of one process, read back from memory; 1.05e9 measured for one thread
STEP_SECONDS = 30  # a stop waits for the end of a step
TEARDOWN_SECONDS = 10  # of ranks and of torch's agent: 2 to 7 s measured in pods
SLOWER = 1.5  # that a volume may be while others write to it, too
FILESYSTEM = 1.06  # of the size that is asked for, ext4 keeps about 6 % for itself
GIB, GB = 1 << 30, 1e9
LINE_BYTES = 300  # of an output beside its row: digest, names, seed, the keys
TOKEN_BYTES = 5  # of a text in UTF-8: about 4 of English, 2 to 6 of other languages
PIXEL_BYTES: Mapping[str, tuple[float, float]] = {"png": (0.5, 2.0), "webp": (0.35, 1.5), "jpeg": (0.05, 0.6)}
"""Format of images → bytes of a pixel, of 3 uncompressed, at least and at most. Generated photographs and drawings of
1024 × 1024 pixels lie between; a plain surface takes less, noise takes 3.
"""


def weight_bytes(weights: Weights, strategy: str) -> int:
    """Of the weights in a checkpoint, apart from those that the optimizer keeps."""
    stage = ZERO_STAGE.get(strategy)
    if stage == 3:
        return 0  # only the optimizer's shards hold them
    kept = weights.learning if weights.adapters or strategy == FSDP else weights.total
    return kept * (weights.computed_bytes if stage else weights.learning_bytes)


def optimizer_bytes(weights: Weights, strategy: str) -> int:
    """Of the optimizer's state in a checkpoint. DeepSpeed's has the weights in fp32, too."""
    return weights.state_bytes + (weights.learning * FP32 if strategy in ZERO_STAGE else 0)


def checkpoint_bytes(weights: Weights, strategy: str, ranks: int, processor_bytes: int) -> int:
    """Of one checkpoint. `processor_bytes`: of the tokenizer's, or image processor's, files. Checkpoints of DeepSpeed
    and FSDP have none of them.
    """
    beside = (
        HISTORY_BYTES
        + ranks * RANK_BYTES
        + weights.tensors * TENSOR_BYTES
        + (0 if strategy in (*ZERO_STAGE, FSDP) else processor_bytes)
    )
    return weight_bytes(weights, strategy) + optimizer_bytes(weights, strategy) + beside


def result_bytes(weights: Weights, strategy: str, processor_bytes: int) -> int:
    """Of the result: a model in its source's type, an adapter in fp32, and with DeepSpeed both in that of the
    computation.
    """
    deepspeed = strategy in ZERO_STAGE
    if weights.adapters:
        each = weights.learning * (weights.computed_bytes if deepspeed else FP32)
        return weights.result_files * each + processor_bytes
    return weights.total * (weights.computed_bytes if deepspeed else weights.source_bytes) + processor_bytes


def copies(training: Training, steps: int) -> int:
    """Checkpoints that lie in the workspace at once: those that are kept, the best one and one in the making, or fewer,
    where fewer are saved.
    """
    if training.load_best_model:
        return min(training.keep_checkpoints + 2, steps)
    return min(training.keep_checkpoints + 1, most_saves(training, steps))


def save_seconds(size: int, ranks: int) -> int:
    """That a checkpoint of `size` bytes takes: written by all to one volume, then hashed by each rank for itself."""
    return math.ceil(size / WRITE_BYTES_PER_SECOND + size / (HASH_BYTES_PER_SECOND * ranks))


def grace_seconds(saving: int) -> int:
    """That a pod needs from SIGTERM to its end, where a save takes `saving` seconds."""
    return math.ceil(STEP_SECONDS + TEARDOWN_SECONDS + SLOWER * saving)


def folder_bytes(folder: Path) -> int:
    """Of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_room(spec: FineTuneJobSpec, plan: Plan, folder: Path, held: int = 0, beside: int = 0) -> None:
    """Whether checkpoints and result fit the volume that `folder` is on; `held` checkpoints lie there already.

    `beside`: bytes that the training will write besides. Raises Failure(STORAGE_ERROR).
    """
    if plan.checkpoint_bytes is None or plan.result_bytes is None or not plan.steps:
        return
    wanted = copies(spec.training, plan.steps)
    needed = max(0, wanted - held) * plan.checkpoint_bytes + plan.result_bytes + beside
    free, total = volume(folder)
    if free >= needed:
        return
    raise Failure(
        ExitCode.STORAGE_ERROR,
        f"spec.workspace.size: {wanted} checkpoints of {amount(plan.checkpoint_bytes)} (keepCheckpoints and one in the"
        f" making) and a result of {amount(plan.result_bytes)} do not fit: {amount(free)} of the volume's"
        f" {amount(total)} are free, {amount(needed)} are needed. Enlarge its claim to"
        f" {claim_for(needed, free, total)}, lower training.keepCheckpoints, or free some of it",
    )


def check_save(folder: Path, size: int, what: str = "the next checkpoint needs") -> None:
    """Whether `size` bytes fit the volume that `folder` is on. `what`: the words before them in the message.

    Raises Failure(STORAGE_ERROR).
    """
    free, total = volume(folder)
    if free < size:
        raise Failure(
            ExitCode.STORAGE_ERROR,
            f"spec.workspace.size: {what} {amount(size)}, and {amount(free)} of the volume's"
            f" {amount(total)} are free. Enlarge its claim to {claim_for(size, free, total)}, or free some of it",
        )


def claim_for(needed: int, free: int, total: int) -> str:
    """Return the size of a claim that has room for `needed` bytes more. `free`, `total`: bytes of the present one."""
    return f"{math.ceil((total - free + needed) * FILESYSTEM / GIB)}Gi"


@dataclass(frozen=True)
class OutputBytes:
    """What the outputs of a generation take of the workspace."""

    least: int
    """Bytes without which it cannot end."""
    most: int
    """Bytes that it may take: of texts those of the longest ones, of images of many details."""


def outputs_bytes(spec: GenerateJobSpec, outputs: int, rows_bytes: int) -> OutputBytes:
    """Return what outputs take. Each of them repeats its row; `rows_bytes`: of all these rows together.

    In another form than lines they are there twice.
    """
    lines = rows_bytes + outputs * LINE_BYTES
    found = OUTPUTS[GENERATION_TASKS[spec.task].settings](spec, outputs, lines)
    copies = 1 if spec.outputs.format == LINES else 2
    return OutputBytes(least=copies * found.least, most=copies * found.most)


def texts_bytes(spec: GenerateJobSpec, outputs: int, lines: int) -> OutputBytes:
    """Return what texts take, with their lines. Most end long before `maxNewTokens`."""
    return OutputBytes(least=lines, most=lines + outputs * spec.text.max_new_tokens * TOKEN_BYTES)


def images_bytes(spec: GenerateJobSpec, outputs: int, lines: int) -> OutputBytes:
    """Return what images take, with their lines."""
    least, most = PIXEL_BYTES[spec.image.format]
    pixels = outputs * spec.image.width * spec.image.height
    return OutputBytes(least=lines + math.ceil(pixels * least), most=lines + math.ceil(pixels * most))


def values_bytes(most: int) -> Callable[[GenerateJobSpec, int, int], OutputBytes]:
    """Return the function for outputs that are values of JSON. `most`: bytes of those of a row, at most."""
    return lambda spec, outputs, lines: OutputBytes(least=lines, most=lines + outputs * most)


OUTPUTS: Mapping[str, Callable[[GenerateJobSpec, int, int], OutputBytes]] = {
    "text": texts_bytes,
    "image": images_bytes,
    "classify": values_bytes(200 * 60),  # labels and scores
    "entities": values_bytes(100 * 100),
    "answers": values_bytes(10 * 300),
    "zeroShot": values_bytes(100 * 60),
    "mask": values_bytes(50 * 80),
    "transcribe": values_bytes(60_000),  # an hour of speech
    "embedding": values_bytes(4096 * 12),  # numbers in fp32 and their commas
}
"""Block of the spec with the settings of a task → (spec, outputs, bytes of their lines) → what they take."""


def check_outputs(needed: OutputBytes, outputs: int, folder: Path) -> None:
    """Check that the outputs fit the volume that `folder` is on. Gives notice if they may not.

    Raises Failure(STORAGE_ERROR) if they cannot.
    """
    check_save(folder, needed.least, f"{outputs:,} outputs need at least")
    free, total = volume(folder)
    if free < needed.most:
        notice(
            f"spec.workspace.size: {outputs:,} outputs may take up to {amount(needed.most)}, and {amount(free)} of the"
            f" volume's {amount(total)} are free; a claim of {claim_for(needed.most, free, total)} has room for them in"
            " any case"
        )


def rows_bytes(rows: Dataset) -> int:
    """Return the bytes of the file of rows that are saved: of those that are chosen, where some are."""
    return int(rows.data.nbytes * len(rows) / max(len(rows.data), 1))


def volume(folder: Path) -> tuple[int, int]:
    """Free bytes, for those who are not root, and all bytes of the volume that `folder`, or the nearest folder above it
    that exists, is on.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    facts = os.statvfs(there)
    return facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize


def amount(size: int) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 1e6:,.1f} MB"
