"""Plans images for the memory of a GPU: what waits in the memory of the node, so that a batch fits.

Only what changes no image is chosen here. What would change them, or how many are made at once, is named where nothing
else helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.alias_generators import to_camel

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.quantity import amount
from luthier_api.run import GenerateRun
from luthier_api.status import Memory, Plan
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace import space

if TYPE_CHECKING:
    from luthier_trainer.generation.image_memory import Part

SHOWN = 200  # characters of a message of another library
AUTO, NONE = "auto", "none"
SAFETY = "spec.image.safety"


def fitted(run: GenerateRun, plan: Plan, paths: Mapping[str, Path], rows: Iterable[Mapping[str, Any]]) -> Plan:
    """Return `plan` with what the images need of the GPU, and what waits elsewhere so that they fit.

    `paths`: field of the spec → pipeline, or the model that checks images. Raises Failure(DOES_NOT_FIT) if nothing
    helps.
    """
    spec = run.spec
    asked = spec.image.offload
    if not spec.resources.gpus:
        return plan.model_copy(update={"offload": NONE})
    size = largest(spec, rows)
    try:
        models = measured(spec, plan, paths, size)
    except Exception as error:  # what a class cannot do on the meta device must not end the job
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"
        notice(f"spec.model: what its images need of the GPU is not known ({what}), and is compared with nothing")
        return plan.model_copy(update={"offload": NONE if asked == AUTO else asked})
    found = needed(models, asked)
    limit = limit_of(run)
    if limit is None:
        name, memory = next(iter(found.items()))
        return plan.model_copy(update={"offload": name, "memory": memory})
    for name, memory in found.items():
        if memory.gpu_bytes <= limit:
            return plan.model_copy(
                update={"offload": name, "memory": memory, "reasons": [*plan.reasons, *why(name, found, limit)]}
            )
    raise Failure(ExitCode.DOES_NOT_FIT, refusal(run, plan, paths, size, found, limit))


def limit_of(run: GenerateRun) -> int | None:
    """Return the bytes of the GPU, by what the user says, or else its class; None if neither does."""
    if run.spec.resources.gpu_memory:
        return int(amount(run.spec.resources.gpu_memory))
    return run.gpu.memory if run.gpu else None


def largest(spec: GenerateJobSpec, rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Return width and height of the largest images of the job: rows may override them."""
    width, height = spec.image.width, spec.image.height
    sizes = set()
    for row in rows:
        own = row.get("settings") or {}
        if "error" not in row:
            sizes.add((own.get("width", width), own.get("height", height)))
    return max(sizes or {(width, height)}, key=lambda size: (size[0] * size[1], size))


def measured(spec: GenerateJobSpec, plan: Plan, paths: Mapping[str, Path], size: tuple[int, int]) -> dict[str, Part]:
    """Return the models of all pipelines, by names, with what each needs."""
    from luthier_trainer.generation.image_memory import CHECKER, Work, checker_of, parts_of
    from luthier_trainer.runtime.devices import DTYPES

    # Precision auto is one of 16 bits on every GPU. Those that have no bf16 hold as much.
    dtype = DTYPES["bf16" if plan.precision in (None, AUTO) else plan.precision]
    work = Work(batch_of(spec, plan), *size, spec.image.guidance > 1, dtype, encodes=spec.image.strength is not None)
    found: dict[str, Part] = {}
    for i, (field, path) in enumerate(paths.items()):
        if field == SAFETY:
            found[CHECKER] = checker_of(path, spec.image)
        else:
            found |= {f"{name}{i or ''}": part for name, part in parts_of(path, spec.image, work, field).items()}
    return found


def batch_of(spec: GenerateJobSpec, plan: Plan) -> int:
    """Return the images of a batch: no more than the job has, as far as the plan says that."""
    return min(spec.batch_size, (plan.rows_per_shard or 1) * spec.shards)


def needed(models: Mapping[str, Part], asked: str) -> dict[str, Memory]:
    """Return what waits elsewhere → what is then needed, of what the job leaves open, the best first."""
    from luthier_trainer.generation.image_memory import TERMS, memory_of

    return {name: memory_of(models, name) for name in TERMS if asked in (AUTO, name)}


def why(name: str, found: Mapping[str, Memory], limit: int) -> list[str]:
    """Return the sentence for what was chosen; none if all models stay on the GPU, or if the job says otherwise."""
    first = next(iter(found.values()))
    if found[name] is first:
        return []
    return [
        f"image.offload: {name}, because a batch needs {space.amount(first.gpu_bytes)} of the GPU without it, which has"
        f" {space.amount(limit)}. So it takes {space.amount(found[name].gpu_bytes)}, and more time; the images are the"
        " same"
    ]


def refusal(
    run: GenerateRun,
    plan: Plan,
    paths: Mapping[str, Path],
    size: tuple[int, int],
    found: Mapping[str, Memory],
    limit: int,
) -> str:
    """Return the message that the images do not fit, with what would."""
    name, least = smallest(found)
    remedies: dict[str, str] = {}
    for field, value, changed in variants(run.spec):
        if field not in remedies:
            other, memory = smallest(needed(measured(changed, plan, paths, size), changed.image.offload))
            if memory.gpu_bytes <= limit:
                remedies[field] = f"{field}: {value} ({space.amount(memory.gpu_bytes)}, with image.offload: {other})"
    width, height = size
    listed = f"What fits: {'; or '.join(remedies.values())}" if remedies else "Use a larger GPU, or make smaller images"
    return (
        f"spec.resources.gpuMemory: a batch of {batch_of(run.spec, plan)} images of {width} × {height} needs"
        f" {space.amount(least.gpu_bytes)} of the GPU with image.offload: {name}, which is"
        f" {space.amount(least.gpu_bytes - limit)} more than it has."
        f" {listed}"
    )


def smallest(found: Mapping[str, Memory]) -> tuple[str, Memory]:
    """Return what waits elsewhere when the least is needed, and how much that is."""
    return min(found.items(), key=lambda entry: entry[1].gpu_bytes)


def variants(spec: GenerateJobSpec) -> Iterator[tuple[str, object, GenerateJobSpec]]:
    """Yield (field, value, spec with it): what the user alone decides, because it changes images or how many there are
    in a batch; the smallest change of each field first.
    """
    for name, value in (("offload", AUTO), ("attention_slicing", True), ("vae_tiling", True)):
        image = spec.image.model_copy(update={name: value})
        yield f"image.{to_camel(name)}", str(value).lower(), spec.model_copy(update={"image": image})
    size = spec.batch_size
    while size > 1:
        size //= 2
        yield "batchSize", size, spec.model_copy(update={"batch_size": size})
