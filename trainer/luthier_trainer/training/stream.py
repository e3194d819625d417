"""Rows that are read and encoded while the model learns (`dataset.streaming`), as a dataset with indices.

Row i is row i of the stream, whatever the number of processes is: each process reads and encodes all rows, and takes
its share of them. So a step has the same rows on any number of processes, and a run that resumes goes on from a
`Position` in its checkpoint. Rows are shuffled within blocks of `shuffleBuffer`; the order in a block follows from the
seed and its number alone, so that no buffer has to be saved.
"""

from __future__ import annotations

import json
import operator
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from torch.utils.data import Dataset

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Stream
from luthier_trainer.data import full_lengths, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.remarks import Remarks
from luthier_trainer.data.remote import without_query
from luthier_trainer.data.selection import Selection
from luthier_trainer.data.shards import Shards
from luthier_trainer.data.streaming import STREAMING, Place, RowStream
from luthier_trainer.models import embedding
from luthier_trainer.models.inspect import MODEL
from luthier_trainer.runtime.failure import Failure, NothingLeft
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.runtime.notices import collecting, notice
from luthier_trainer.tasks.base import Processor, Task
from luthier_trainer.tasks.rows import columns_of, usable
from luthier_trainer.tasks.texts import ADD_ROWS
from luthier_trainer.workspace.manifest import replace_file

if TYPE_CHECKING:
    import datasets

FILE = "stream.json"
BUFFER = 10_000  # rows, as in axolotl; `datasets` has 1,000
LOOK_SECONDS = 5.0
CLOSE_SECONDS = 5.0  # the thread may be in the middle of a block or a download, and ends with the process
USE = "training"


@dataclass(frozen=True)
class Counts:
    """What became of the rows that were read, in all laps."""

    read: int = 0
    unusable: int = 0
    """Rows of which nothing can be learnt."""
    filtered: int = 0
    """Rows that `dataset.filter` leaves out."""
    cut: int = 0
    """Rows that were cut at maxLength."""

    def __add__(self, more: Counts) -> Counts:
        return Counts(*map(operator.add, astuple(self), astuple(more)))


@dataclass(frozen=True)
class Position:
    """Where a block begins."""

    row: int = 0
    """Encoded rows before it."""
    block: int = 0
    place: Place = field(default_factory=Place)
    """Of the window in which it begins."""
    within: int = 0
    """Encoded rows of this window that are in the block before."""
    counted: Counts = field(default_factory=Counts)
    """Before that window."""


@dataclass(frozen=True)
class Window:
    """Encoded rows of a window."""

    place: Place
    rows: datasets.Dataset | None
    """None: none of its rows can be learnt."""
    counts: Counts


@dataclass(frozen=True)
class Block:
    """Rows that are shuffled with each other."""

    begin: Position
    rows: datasets.Dataset
    order: numpy.ndarray | None
    """Positions in `rows`, int64 of shape (rows,); None: their own order."""
    counted: Counts
    """With the windows of which it has rows."""

    def row(self, number: int) -> dict[str, Any]:
        """Return row `number` of the stream."""
        within = number - self.begin.row
        found: dict[str, Any] = self.rows[within if self.order is None else int(self.order[within])]
        return found

    @property
    def end(self) -> int:
        """The number of the row after it in the stream."""
        return self.begin.row + len(self.rows)


class EncodedStream:
    """The rows of a stream as the model learns them, in blocks."""

    def __init__(self, rows: RowStream, task: Task, spec: FineTuneJobSpec, processor: Processor, log: bool) -> None:
        """`spec`: with the form of the rows. `log`: whether notices about windows are printed."""
        self.rows, self.task, self.spec, self.processor, self.log = rows, task, spec, processor, log
        asked = spec.dataset.shuffle_buffer
        self.buffer = BUFFER if asked is None else asked
        self.remarks = Remarks()
        self.windows_read = 0
        """For the heartbeat: it grows while there is progress."""

    def blocks(self, begin: Position) -> Generator[Block, None, None]:
        """Yield the blocks from `begin` on, without an end. Raises Failure if the files have no row to learn from."""
        held: list[datasets.Dataset] = []
        position, count = begin, 0
        counted = begin.counted
        lap, lap_rows = begin.place.lap, 0
        skipped = begin.within
        for window in self._windows(begin.place):
            if window.place.lap != lap:
                if held:
                    yield self._block(position, held, counted)
                    position, held, count = self._after(position, count), [], 0
                if not lap_rows and lap != begin.place.lap:
                    raise Failure(
                        ExitCode.INVALID_DATASET, f"{STREAMING}: none of the rows of all files can be learnt from"
                    )
                lap, lap_rows = window.place.lap, 0
            rows = window.rows
            within = skipped if window.place == begin.place else 0
            while rows is not None and within < len(rows):
                if not count:
                    position = replace(position, place=window.place, within=within, counted=counted)
                taken = min(len(rows) - within, (self.buffer or len(rows)) - count)
                held.append(rows.select(range(within, within + taken)))
                count, within, lap_rows = count + taken, within + taken, lap_rows + taken
                if count >= (self.buffer or 1):
                    yield self._block(position, held, counted + window.counts)
                    position, held, count = self._after(position, count), [], 0
            counted += window.counts

    def _after(self, position: Position, count: int) -> Position:
        return replace(position, row=position.row + count, block=position.block + 1)

    def _block(self, begin: Position, parts: list[datasets.Dataset], counted: Counts) -> Block:
        from datasets import concatenate_datasets

        rows = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        if not self.buffer:
            return Block(begin, rows, None, counted)
        random = numpy.random.default_rng([self.spec.training.seed, begin.block])
        return Block(begin, rows, random.permutation(len(rows)), counted)

    def _windows(self, place: Place) -> Iterator[Window]:
        for begin, rows in self.rows.windows(place):
            yield self._encoded(begin, rows)
            self.windows_read += 1

    def _encoded(self, place: Place, rows: Rows) -> Window:
        """Return the rows of a window that can be learnt, encoded as `prepare` does it. Raises Failure."""
        import datasets

        selection, encoded = Selection(USE), None
        with collecting() as texts, tokens.in_memory():
            try:
                fitting = usable(rows, self.task, self.spec, selection)[0]
                encoded = self.task.encode(fitting, self.processor, self.spec, None, USE)
                missing = self.rows.stream.missing_tokens
                data = datasets.DatasetDict({"train": encoded})
                embedding.check_rows(missing, data, self.processor, MODEL, ADD_ROWS)
            except NothingLeft as failure:
                texts.append(failure.message)
        for text in self.remarks.add(texts, rows.origin):
            if self.log:
                print(f"rows {place.row} to {place.row + len(rows.data) - 1} of {rows.origin}: {text}", flush=True)
        lengths = full_lengths.take(USE)
        filtered = sum(selection.left_out.values()) + full_lengths.take_left_out(USE).total()
        packed = self.spec.training.packing == "isolated"
        learnt = 0
        if encoded is not None:
            learnt = len(lengths) if packed else len(encoded)  # in a bin are several rows
        counts = Counts(
            read=len(rows.data),
            unusable=max(len(rows.data) - filtered - learnt, 0),
            filtered=filtered,
            cut=0 if packed else int((lengths > self.spec.training.max_length).sum()),
        )
        return Window(place, encoded if learnt else None, counts)


class StreamedRows(Dataset[dict[str, Any]]):
    """The rows of a whole training. They are asked for in increasing order, and a block is read ahead."""

    def __init__(self, stream: EncodedStream, length: int, begin: Position) -> None:
        """`length`: rows of the training. `begin`: the first row that is asked for is not before it."""
        self.stream, self.length = stream, length
        self._positions = [begin]
        self._block: Block | None = None
        self._waiting: queue.Queue[Block | BaseException] = queue.Queue()
        self._room = threading.Semaphore(1)
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(begin,), name="stream", daemon=True)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return an encoded row. Raises the Failure of a row before it that cannot be read."""
        block = self._block
        while block is None or number >= block.end:
            block = self._block = self._next()
        assert number >= block.begin.row, "rows are asked for in increasing order"
        return block.row(number)

    def _next(self) -> Block:
        """Return the next block as soon as it is read. Raises what the reading of it has raised."""
        if self._reader.ident is None:
            self._reader.start()
        seen = self.stream.windows_read
        while True:
            try:
                block = self._waiting.get(timeout=LOOK_SECONDS)
                break
            except queue.Empty:
                if self.stream.windows_read != seen:
                    seen = self.stream.windows_read
                    beat()
        if isinstance(block, BaseException):
            raise block
        self._room.release()
        before = self._positions[-1]
        if block.begin.place.lap > before.place.lap and self.stream.log:
            self._tell_again(block.begin)
        if block.begin.row == before.row:
            self._positions.pop()
        self._positions.append(block.begin)
        return block

    def _tell_again(self, begin: Position) -> None:
        text = (
            f"{STREAMING}: the stream has ended after {begin.row} rows, fewer than training.maxSteps sees, and begins"
            " again"
        )
        if begin.place.lap == 1:
            notice(text)
            return
        print(f"{text} ({begin.place.lap + 1} times in all)", flush=True)

    def _read(self, begin: Position) -> None:
        """Read a block ahead, in a thread of its own."""
        blocks = self.stream.blocks(begin)
        while not self._over.is_set():
            if not self._room.acquire(timeout=0.2):
                continue
            try:
                self._waiting.put(next(blocks))
            except BaseException as error:  # it is raised where rows are asked for
                self._waiting.put(error)
                return
        blocks.close()

    def close(self) -> None:
        """Stop reading."""
        self._over.set()
        if self._reader.ident is not None:
            self._reader.join(timeout=CLOSE_SECONDS)

    def tell(self) -> None:
        """Give notice of what was read up to the present block, and of what was not learnt of it."""
        if self._block is None:
            return
        counts, laps = self._block.counted, self._block.begin.place.lap + 1
        found = (
            (counts.filtered, "were left out by dataset.filter"),
            (counts.unusable, "had nothing to learn, and were left out"),
            (counts.cut, "were cut at training.maxLength"),
        )
        told = [f"{count} {what}" for count, what in found if count]
        times = f", in {laps} passes over the data" if laps > 1 else ""
        notice(f"{STREAMING}: {counts.read} rows were read{times}; {'; '.join(told) or 'all of them could be learnt'}")

    def pass_by(self, row: int) -> None:
        """Forget the positions before that from which a run goes on with row `row`."""
        while len(self._positions) > 1 and self._positions[1].row <= row:
            del self._positions[0]

    def save(self, folder: Path) -> None:
        """Write the position from which a run goes on with the row of the last `pass_by`."""
        state = {"position": asdict(self._positions[0]), "digests": self.stream.rows.shards.digests}
        replace_file(folder / FILE, json.dumps(state).encode())


def saved(folder: Path) -> tuple[Position, dict[int, str]]:
    """Return (the position in the stream, what files are known by) of a checkpoint."""
    state = json.loads((folder / FILE).read_bytes())
    position = state["position"]
    position |= {"place": Place(**position["place"]), "counted": Counts(**position["counted"])}
    return Position(**position), {int(number): digest for number, digest in state["digests"].items()}


def streamed_rows(
    task: Task,
    spec: FineTuneJobSpec,
    stream: Stream,
    processor: Processor,
    folder: Path,
    rank: int,
    resume: Path | None,
) -> StreamedRows:
    """Return the rows of a run. `folder`: for downloads. `resume`: the checkpoint from which it goes on."""
    import datasets

    datasets.disable_progress_bars()
    begin, digests = saved(resume) if resume else (Position(), {})
    where = "spec.dataset.files" if spec.dataset.files else "spec.dataset.id"
    signed = {without_query(name): name for name in spec.dataset.files or []}
    shards = Shards([signed.get(name, name) for name in stream.files], where, folder, str(rank), digests)
    form = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"form": stream.form})})
    seed = None if spec.dataset.shuffle_buffer == 0 else spec.training.seed
    encoded = EncodedStream(
        RowStream(stream, shards, columns_of(task, form), seed), task, form, processor, log=rank == 0
    )
    assert spec.training.max_steps is not None, "the rules of the API want it"
    return StreamedRows(encoded, spec.training.max_steps * spec.training.batch_size, begin)
