"""Plans texts for the memory of a GPU: a model that does not fit is refused, with what would.

Nothing is chosen here: what takes less memory takes much more time, or changes the texts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun
from luthier_api.spec import Quantization
from luthier_api.status import Memory, Plan
from luthier_api.tasks import TASKS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import rows
from luthier_trainer.models import checks, inspect, processors
from luthier_trainer.prepare.image_plan import AUTO, SHOWN, batch_of, limit_of
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace import space

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from luthier_trainer.generation.text_memory import Work

MODEL = "spec.model"
TOKENISED = 64  # rows with the most characters, of which the one with the most tokens is taken
CHARACTERS = 4  # of a token, about, where rows are compared before they are tokenised
NO_LIMIT = 10**9  # tokenizers whose files set no length have a larger one than any text


def fitted(run: GenerateRun, plan: Plan, path: Path, prepared_rows: Path) -> Plan:
    """Return `plan` with what the texts need of the GPU. `prepared_rows`: the file of them.

    Raises Failure(DOES_NOT_FIT) if it is more than the GPU has.
    """
    spec = run.spec
    plan = plan.model_copy(update={"offload": spec.text.offload if spec.text else None})
    if not spec.resources.gpus or TASKS[spec.task].modality != "text":
        return plan
    config = inspect.read_config(path, MODEL)
    tokenizer = processors.read_tokenizer(WorkspaceFolder(Path(run.workspace)).prepared / "tokenizer", MODEL)
    read, written = longest(spec, rows.read(prepared_rows), tokenizer, inspect.max_positions(config))
    try:
        memory = measured(spec, plan, config, read, written)
    except Exception as error:  # what an architecture cannot do on the meta device must not end the job
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"
        notice(f"{MODEL}: what its texts need of the GPU is not known ({what}), and is compared with nothing")
        return plan
    limit = limit_of(run)
    if limit is not None and memory.gpu_bytes > limit:
        raise Failure(ExitCode.DOES_NOT_FIT, refusal(spec, plan, config, read, written, memory, limit))
    return plan.model_copy(update={"memory": memory})


def longest(
    spec: GenerateJobSpec, lines: Iterable[rows.Line], tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[int, int]:
    """Return the tokens of the longest text that is read, and of the longest that is written after it.

    Texts that are longer than the model reads are errors, or cut.
    """
    most = heapq.nlargest(
        TOKENISED,
        (line for line in lines if "error" not in line),
        key=lambda line: characters(spec, line) / CHARACTERS + written_after(spec, line),
    )
    limits = [positions or NO_LIMIT]
    if TASKS[spec.task].auto_model != "CausalLM":
        limits.append(tokenizer.model_max_length)
    found = [(tokens_of(spec, line, tokenizer), written_after(spec, line)) for line in most]
    if TASKS[spec.task].auto_model == "CausalLM":
        fits = [(read, written) for read, written in found if read + written <= limits[0]]
        return max(fits, key=sum, default=(1, spec.text.max_new_tokens))
    return min(max((read for read, _ in found), default=1), *limits), max((new for _, new in found), default=0)


def characters(spec: GenerateJobSpec, line: rows.Line) -> int:
    """Return the characters that the model reads of a row."""
    return sum(len(str(line.get(role) or "")) for role in TASKS[spec.task].generated.columns)


def written_after(spec: GenerateJobSpec, line: rows.Line) -> int:
    """Return the tokens that are written of a row at most; 0 if none are."""
    if not spec.text:
        return 0
    return int((line.get("settings") or {}).get("maxNewTokens", spec.text.max_new_tokens))


def tokens_of(spec: GenerateJobSpec, line: rows.Line, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens that the model reads of a row at once."""
    first, *second = (str(line[role]) for role in TASKS[spec.task].generated.columns)
    if spec.text:
        first = (spec.text.prefix or "") + first
    if spec.zero_shot and spec.zero_shot.labels:
        second = [max((spec.zero_shot.hypothesis.format(label) for label in spec.zero_shot.labels), key=len)]
    # A chat template has written the tokens that begin a text.
    special = not (spec.text and spec.text.chat)
    tokens = len(tokenizer(first, *second, add_special_tokens=special, verbose=False)["input_ids"])
    return min(tokens, spec.answers.window) if spec.answers else tokens


def measured(spec: GenerateJobSpec, plan: Plan, config: PreTrainedConfig, read: int, written: int) -> Memory:
    """Return what the texts need of a GPU."""
    from luthier_trainer.generation.text_memory import memory_of
    from luthier_trainer.runtime.devices import DTYPES

    # Precision auto is one of 16 bits on every GPU. Those that have no bf16 hold as much.
    dtype = DTYPES["bf16" if plan.precision in (None, AUTO) else plan.precision]
    kind = spec.model.quantization.type if spec.model.quantization else checks.stored_type(config)
    offload = bool(spec.text) and spec.text.offload == "layers"
    return memory_of(config, spec.task, work_of(spec, plan, read, written, kind == "int8"), dtype, kind, offload)


def work_of(spec: GenerateJobSpec, plan: Plan, read: int, written: int, alone: bool) -> Work:
    """Return what is worked on at once. `alone`: whether it is one row."""
    from luthier_trainer.generation.engines.reading import rounded
    from luthier_trainer.generation.text_memory import Work

    causal = TASKS[spec.task].auto_model == "CausalLM"
    return Work(
        texts=1 if alone else batch_of(spec, plan),
        read=read if causal else rounded(read),
        written=written,
        beams=spec.text.num_beams if spec.text else 1,
        draws=bool(spec.text) and spec.text.temperature > 0,
    )


def refusal(
    spec: GenerateJobSpec, plan: Plan, config: PreTrainedConfig, read: int, written: int, memory: Memory, limit: int
) -> str:
    """Return the message that the texts do not fit, with what would."""
    remedies: dict[str, str] = {}
    for field, value, changed in variants(spec, config):
        if field not in remedies:
            needed = measured(changed, plan, config, read, written).gpu_bytes
            if needed <= limit:
                remedies[field] = f"{field}: {value} ({space.amount(needed)})"
    listed = f"What fits: {'; or '.join(remedies.values())}" if remedies else "Use a larger GPU, or a smaller model"
    texts = work_of(spec, plan, read, written, alone=False).texts
    return (
        f"spec.resources.gpuMemory: a batch of {texts} with {read + written} tokens each needs"
        f" {space.amount(memory.gpu_bytes)} of the GPU, which is {space.amount(memory.gpu_bytes - limit)} more than it"
        f" has. {listed}"
    )


def variants(spec: GenerateJobSpec, config: PreTrainedConfig) -> Iterator[tuple[str, str, GenerateJobSpec]]:
    """Yield (field, value, spec with it): what the user alone decides, the smallest change of each field first."""
    size = spec.batch_size
    while size > 1:
        size //= 2
        yield "batchSize", str(size), spec.model_copy(update={"batch_size": size})
    quantised = spec.model.quantization or checks.stored_type(config)
    if spec.task == "text-generation" and not quantised and spec.text.offload != "layers":
        text = spec.text.model_copy(update={"offload": "layers"})
        yield "text.offload", "layers", spec.model_copy(update={"text": text})
    waits = spec.text and spec.text.offload == "layers"
    if not quantised and not waits and not spec.adapters and not getattr(config, "quantization_config", None):
        for kind in ("int8", "nf4"):
            model = spec.model.model_copy(update={"quantization": Quantization(type=kind)})
            yield "model.quantization", f"{{type: {kind}}}", spec.model_copy(update={"model": model})
