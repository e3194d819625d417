"""Plans what models of transformers do for the memory of a GPU: one that does not fit is refused, with what would.

Nothing is chosen here: what takes less memory takes much more time, or changes the answers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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

    from luthier_trainer.generation.answer_memory import Work

MODEL = "spec.model"
TOKENISED = 64  # rows with the most characters, of which the one with the most tokens is taken
CHARACTERS = 4  # of a token, about, where rows are compared before they are tokenised
NO_LIMIT = 10**9  # tokenizers whose files set no length have a larger one than any text


def fitted(run: GenerateRun, plan: Plan, path: Path, prepared_rows: Path) -> Plan:
    """Return `plan` with what the model needs of the GPU. `prepared_rows`: the file of the rows.

    Raises Failure(DOES_NOT_FIT) if it is more than the GPU has.
    """
    spec = run.spec
    plan = plan.model_copy(update={"offload": spec.text.offload if spec.text else None})
    if not spec.resources.gpus:
        return plan
    config = inspect.read_config(path, MODEL)
    row = LARGEST[TASKS[spec.task].modality](spec, config, WorkspaceFolder(Path(run.workspace)), prepared_rows)
    try:
        memory = measured(spec, plan, config, row)
    except Exception as error:  # what an architecture cannot do on the meta device must not end the job
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"
        notice(f"{MODEL}: what its {row.name} need of the GPU is not known ({what}), and is compared with nothing")
        return plan
    limit = limit_of(run)
    if limit is not None and memory.gpu_bytes > limit:
        raise Failure(ExitCode.DOES_NOT_FIT, refusal(spec, plan, config, row, memory, limit))
    return plan.model_copy(update={"memory": memory})


@dataclass(frozen=True)
class Row:
    """What the model reads and writes of one row, at most."""

    name: str
    """What rows are, for people: a plural."""
    read: tuple[int, ...]
    """Shape of what is read: tokens, or the input of an image or of audio."""
    written: int
    """Tokens; 0 if none are written."""

    @property
    def size(self) -> str:
        """Return how large it is, for people."""
        if len(self.read) == 1:
            return f"{self.read[0] + self.written} tokens each"
        written = f" and {self.written} tokens" if self.written else ""
        return f"{' x '.join(map(str, self.read))} values{written} each"


def largest_text(spec: GenerateJobSpec, config: PreTrainedConfig, folder: WorkspaceFolder, prepared_rows: Path) -> Row:
    tokenizer = processors.read_tokenizer(folder.prepared / "tokenizer", MODEL)
    read, written = longest(spec, rows.read(prepared_rows), tokenizer, inspect.max_positions(config))
    return Row("texts", (read,), written)


def largest_image(spec: GenerateJobSpec, config: PreTrainedConfig, folder: WorkspaceFolder, prepared_rows: Path) -> Row:
    """Return the same for images, which all become inputs of one size."""
    from luthier_trainer.generation.engines.looking import PROCESSOR
    from luthier_trainer.tasks import images

    shape = images.shape_of(processors.read_image_processor(folder.prepared / PROCESSOR, MODEL))
    written = max((written_after(spec, line) for line in rows.read(prepared_rows)), default=0)
    return Row("images", shape, written)


def largest_audio(spec: GenerateJobSpec, config: PreTrainedConfig, folder: WorkspaceFolder, prepared_rows: Path) -> Row:
    """Return the same for audio, which becomes inputs of one size, a window at a time, with the longest of texts."""
    from luthier_trainer.generation.engines.speech import PROCESSOR
    from luthier_trainer.tasks.audio import Hearing

    extractor = processors.read_speech_processor(folder.prepared / PROCESSOR, MODEL).feature_extractor
    hearing = Hearing.up_to(extractor, None)
    shape = hearing.example(hearing.most)[extractor.model_input_names[0]].shape[1:]
    return Row("audio files", tuple(shape), config.max_target_positions)


LARGEST: Mapping[str, Callable[[GenerateJobSpec, PreTrainedConfig, WorkspaceFolder, Path], Row]] = {
    "text": largest_text,
    "image": largest_image,
    "speech": largest_audio,
}
"""Modality of a task → what its largest row is. The last argument is the file of the prepared rows."""


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


def measured(spec: GenerateJobSpec, plan: Plan, config: PreTrainedConfig, row: Row) -> Memory:
    """Return what the model needs of a GPU for a batch of the largest rows."""
    from luthier_trainer.generation.answer_memory import memory_of
    from luthier_trainer.runtime.devices import DTYPES

    # Precision auto is one of 16 bits on every GPU. Those that have no bf16 hold as much.
    dtype = DTYPES["bf16" if plan.precision in (None, AUTO) else plan.precision]
    kind = spec.model.quantization.type if spec.model.quantization else checks.stored_type(config)
    offload = bool(spec.text) and spec.text.offload == "layers"
    return memory_of(config, spec.task, work_of(spec, plan, row, kind == "int8"), dtype, kind, offload)


def work_of(spec: GenerateJobSpec, plan: Plan, row: Row, alone: bool) -> Work:
    """Return what is worked on at once. `alone`: whether it is one row."""
    from luthier_trainer.generation.answer_memory import Work
    from luthier_trainer.generation.engines.reading import rounded

    writes = spec.text or spec.transcribe
    beams = writes.num_beams if writes else 1
    # Whisper searches for all files of a batch at once, the other engines for one row.
    alone = alone or bool(spec.text and beams > 1)
    is_padded = len(row.read) == 1 and TASKS[spec.task].auto_model != "CausalLM"
    return Work(
        rows=1 if alone else batch_of(spec, plan),
        read=(rounded(*row.read),) if is_padded else row.read,
        written=row.written,
        beams=beams,
        draws=bool(spec.text) and spec.text.temperature > 0,
    )


def refusal(spec: GenerateJobSpec, plan: Plan, config: PreTrainedConfig, row: Row, memory: Memory, limit: int) -> str:
    """Return the message that the model does not fit, with what would."""
    remedies: dict[str, str] = {}
    for field, value, changed in variants(spec, config):
        if field not in remedies:
            needed = measured(changed, plan, config, row).gpu_bytes
            if needed <= limit:
                remedies[field] = f"{field}: {value} ({space.amount(needed)})"
    listed = f"What fits: {'; or '.join(remedies.values())}" if remedies else "Use a larger GPU, or a smaller model"
    together = work_of(spec, plan, row, alone=False).rows
    return (
        f"spec.resources.gpuMemory: a batch of {together} {row.name} with {row.size} needs"
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
