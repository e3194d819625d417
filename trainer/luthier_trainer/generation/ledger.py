"""The ledger of one shard: which outputs are there, kept so that a kill at any moment loses one batch at most.

Each attempt writes into a folder of its own (`progress`): outputs are appended to a journal, and move in their order
into a table, a segment at a time. So an attempt that resumes reads one journal, of bounded length, and nothing of what
is in a table. At the end, `finish` reads the tables once, and writes the result with a manifest, which `publish` needs.
Attempts share no file: a pod on a lost node may go on writing beside the pod that replaces it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

from luthier_api.exitcodes import ExitCode
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.kinds import kind_of, merged
from luthier_trainer.generation.progress import (
    INDEX,
    JOURNAL,
    START,
    TABLE,
    Pending,
    Piece,
    State,
    append_durably,
    encode,
    parse,
    shown,
)
from luthier_trainer.generation.records import UNSAFE, Line, RecordForm, digest
from luthier_trainer.generation.result import ShardResult, link, shard_name
from luthier_trainer.generation.samples import Output, Unusable
from luthier_trainer.generation.scores import numbers_of
from luthier_trainer.generation.writing import at_the_same_time
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat_before_first_step
from luthier_trainer.runtime.notices import notice
from luthier_trainer.scoring import sums
from luthier_trainer.scoring.sums import Sums
from luthier_trainer.workspace.manifest import fsync, replace_file

SEGMENT = 1000  # outputs that move from the journal into the table together
FINISH = "finishReason"
"""Key that says why a text has ended; of one that cannot be made it says so, too."""
AT_ONCE = 64  # lines that are verified between two heartbeats


class Shard:
    """The outputs of shard `index` of `count`, stored in the record form of their engine.

    `span`: the numbers of its outputs. `settings`: everything that an output depends on, besides its row.
    `environment`: libraries and hardware, with which outputs are bit-identical.
    """

    def __init__(
        self,
        folder: WorkspaceFolder,
        index: int,
        count: int,
        records: RecordForm,
        span: range,
        settings: dict[str, Any],
        environment: str,
    ) -> None:
        self.records, self.span = records, span
        # Converted as JSON does it, where 1.0 and 1 are the same number, so that settings can be compared.
        self.settings = json.loads(json.dumps(settings))
        document = {"settings": self.settings, "environment": environment}
        self.run = digest(json.dumps(document, sort_keys=True).encode())[:16]
        """Identifies settings and environment: each line has it, and `runs` what it stands for."""
        self.runs: dict[str, Any] = {self.run: document}
        self.folder = folder.shards / shard_name(index, count)
        self.result = ShardResult(folder, index, count, records)
        self.state = State()
        self.pending: dict[int, Pending] = {}
        """Number → output, of those that are in the journal."""
        self.resumed: frozenset[int] = frozenset()
        """Numbers of those that an earlier attempt has left there."""
        self.done = self.failed = self.unsafe = 0
        """Number of outputs that are there, errors included, of those that cannot be made, and of unsafe images."""
        self.sums: Sums = {}
        """Sums over those that were compared with references."""
        self.first_error: str | None = None
        """Why the first of them cannot be made."""
        self.attempt = 0
        self.verified = State()
        """What `finish` has written, before the segment that it is at."""

    @property
    def first_left(self) -> int:
        """Number of the first output that is in no table."""
        return self.span.start + self.state.outputs

    def is_there(self, number: int) -> bool:
        """Return whether an earlier attempt has left an output. `number`: from `first_left` on, as it was then."""
        return number in self.resumed

    def own(self, attempt: int) -> Path:
        """Return the folder of an attempt."""
        return self.folder / f"{attempt:04d}"

    @property
    def files(self) -> Path:
        """Folder of this attempt, below which the files of its outputs lie."""
        return self.own(self.attempt)

    def resume(self) -> None:
        """Begin an attempt that continues the newest one before it. A notice names what is not used of it, and why."""
        attempts = sorted(int(path.parent.name) for path in self.folder.glob(f"*/{START}"))
        kept: list[tuple[int, Line]] = []
        if attempts:
            before = attempts[-1]
            start = json.loads((self.own(before) / START).read_bytes())
            state = self._state_of(before, State.of(start["state"]))
            journal, unreadable = self._journal(before, self.span.start + state.outputs)
            left = state.outputs + len(journal) + unreadable
            if changed := self._changed(start["settings"]):
                self._report(Counter({changed: left}), left)
                shutil.rmtree(self.folder)
            else:
                self.state, self.runs = state, start["runs"] | self.runs
                refused = Counter({"it cannot be read": unreadable})
                for (number, line), damage in zip(journal, self._damages(before, journal), strict=True):
                    if damage:
                        refused[damage] += 1
                    else:
                        kept.append((number, line))
                self._report(refused, left)
        self._begin(attempts[-1] if attempts else 0, kept)

    def _begin(self, before: int, kept: Sequence[tuple[int, Line]]) -> None:
        """Make the folder of a new attempt, with the lines and files that it takes over from the journal of `before`.

        `start.json` is written last: a folder without it does not count.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
        self.attempt = max([before, *taken]) + 1
        self.done, self.failed, self.first_error = self.state.outputs, self.state.failed, self.state.first_error
        self.unsafe, self.sums = self.state.unsafe, sums.read(self.state.sums)
        self.files.mkdir()  # fails if another pod has just begun the same attempt
        for number, line in kept:
            if name := self.records.file(line):
                target = self.files / name
                target.parent.mkdir(parents=True, exist_ok=True)
                link(self.own(before) / name, target)
            self._take(number, line)
        self.resumed = frozenset(self.pending)
        for parent in {(self.files / name).parent for _, line in kept if (name := self.records.file(line))}:
            fsync(parent)
        self._write_journal()
        start = {"settings": self.settings, "runs": self.runs, "state": asdict(self.state)}
        replace_file(self.files / START, json.dumps(start).encode())
        fsync(self.folder)

    def _state_of(self, attempt: int, state: State) -> State:
        """Return the state at the end of an attempt that began with `state`: that of its last whole segment."""
        table = self.own(attempt) / TABLE
        size = table.stat().st_size if table.exists() else 0
        for entry in self._segments(attempt):
            if entry["end"] <= size:
                state = State.of(entry["state"])
        return state

    def _segments(self, attempt: int) -> Iterator[dict[str, Any]]:
        """Yield the entries of the index of an attempt, as far as they are whole."""
        index = self.own(attempt) / INDEX
        if not index.exists():
            return
        with index.open("rb") as file:
            for text in file:
                entry = parse(text) if text.endswith(b"\n") else None
                if entry is None:
                    return
                yield entry

    def _journal(self, attempt: int, first: int) -> tuple[list[tuple[int, Line]], int]:
        """Return number and line of each output in the journal of an attempt that is not in a table, and how many lines
        cannot be read. `first`: number of the first output that is in no table.
        """
        found: dict[int, Line] = {}
        unreadable = 0
        path = self.own(attempt) / JOURNAL
        texts = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for text in texts:
            # A last line without a line break was cut off when the shard was killed. This needs no notice.
            if not text.endswith(b"\n"):
                continue
            number, _, rest = text.partition(b"\t")
            line = parse(rest) if number.isdigit() else None
            if line is None:
                unreadable += 1
            elif first <= int(number) < self.span.stop:
                found[int(number)] = line
        return list(found.items()), unreadable

    def _changed(self, before: dict[str, Any]) -> str | None:
        """Return why outputs that were made with the settings `before` cannot be used; None if they can."""
        now = self.settings
        changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        return ", ".join(f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}" for name in changed)

    def _damages(self, attempt: int, journal: Sequence[tuple[int, Line]]) -> Iterator[str | None]:
        """Yield for each line why its output cannot be used, or None; sends a heartbeat every few lines."""
        lines = [line for _, line in journal]
        for first in range(0, len(lines), AT_ONCE):
            beat_before_first_step()
            some = lines[first : first + AT_ONCE]
            other = [set(line) != set(self.records.keys) for line in some]
            for damage, strange in zip(self.records.damages(some, self.own(attempt)), other, strict=True):
                yield "another version of Luthier wrote the line" if strange else damage

    def _report(self, refused: Counter[str], written: int) -> None:
        reasons = [f"{count} because {reason}" for reason, count in refused.most_common() if count]
        if reasons:
            notice(
                f"spec: {sum(refused.values())} of {written} outputs that an earlier attempt left in {self.folder.name}"
                f" are not used: {'; '.join(reasons)}"
            )

    def _take(self, number: int, line: Line) -> None:
        """Count the line of an output as pending."""
        error = None if line["error"] is None else f"row {line['row']}: {line['error']}"
        numbers = numbers_of(self.settings["task"], line)
        unsafe = bool(line.get(UNSAFE))
        self.pending[number] = Pending(encode(line), error, unsafe, numbers)
        self.sums = sums.added(self.sums, numbers)
        self.done += 1
        self.failed += error is not None
        self.unsafe += unsafe
        self.first_error = self.first_error or error
        self.state = replace(self.state, kind=merged(self.state.kind, kind_of(line)))

    def append(self, outputs: Sequence[Output]) -> None:
        """Store outputs: first their files, then their lines. Both are flushed to disk on return."""
        if not outputs:
            return
        numbers = [output.sample.number for output in outputs]
        # A line without a file takes less time than a thread for it.
        made = at_the_same_time(self._line, outputs) if self.records.has_files else map(self._line, outputs)
        lines = list(zip(numbers, made, strict=True))
        for parent in {(self.files / name).parent for _, line in lines if (name := self.records.file(line))}:
            fsync(parent)
        for number, line in lines:
            self._take(number, line)
        append_durably(self.files / JOURNAL, b"".join(self._journalled(number) for number, _ in lines))
        while len(self.pending) >= SEGMENT and self._seal(SEGMENT):
            pass

    def _line(self, output: Output) -> Line:
        """Write the file of an output, if it has one, and return its line."""
        sample = output.sample
        made = {"error": output.error} if output.error is not None else self._write(output)
        keys = self.records.keys
        if made.get("error") is not None and FINISH in keys:
            made[FINISH] = "error"
        line = {**sample.facts(), **output.facts, "input": sample.input, "run": self.run, **made}
        assert line.keys() <= set(keys), f"lines have no {line.keys() - set(keys)}"
        return {key: line.get(key) for key in keys}

    def _write(self, output: Output) -> Line:
        """Write the file of an output, and return the fields of its line."""
        try:
            return self.records.write(output, self.files)
        except Unusable as error:
            return {"error": str(error)}

    def _journalled(self, number: int) -> bytes:
        return b"%d\t%b" % (number, self.pending[number].text)

    def _write_journal(self) -> None:
        replace_file(self.files / JOURNAL, b"".join(map(self._journalled, self.pending)))

    def _seal(self, count: int) -> bool:
        """Move the next `count` outputs into the table. Returns False if one of them is missing.

        A kill between the three writes leaves bytes in the table that no entry of the index covers, or lines in the
        journal that are in the table, too. Both are ignored when the shard resumes.
        """
        numbers = range(self.first_left, self.first_left + count)
        if any(number not in self.pending for number in numbers):
            return False
        self._refuse_a_newer_attempt()
        segment = [self.pending.pop(number) for number in numbers]
        text = b"".join(item.text for item in segment)
        errors = [item.error for item in segment if item.error is not None]
        pieces = {piece.attempt: piece for piece in self.state.pieces}
        piece = pieces.get(self.attempt, Piece(self.attempt, 0, 0))
        pieces[self.attempt] = replace(piece, outputs=piece.outputs + count, size=piece.size + len(text))
        total = reduce(sums.added, (item.numbers for item in segment), sums.read(self.state.sums))
        self.state = replace(
            self.state,
            sums=sums.written(total),
            pieces=tuple(pieces.values()),
            failed=self.state.failed + len(errors),
            unsafe=self.state.unsafe + sum(item.unsafe for item in segment),
            first_error=self.state.first_error or next(iter(errors), None),
        )
        entry = {"end": pieces[self.attempt].size, "size": len(text), "sha256": digest(text)}
        append_durably(self.files / TABLE, text)
        append_durably(self.files / INDEX, encode(entry | {"state": asdict(self.state)}))
        self._write_journal()
        return True

    def _refuse_a_newer_attempt(self) -> None:
        """Raise Failure if another pod has begun to work on this shard, which then does not read what this one adds."""
        if any(self.folder.glob(f"{self.attempt + 1:04d}/{START}")):
            raise Failure(
                ExitCode.INFRASTRUCTURE_ERROR,
                f"{self.folder.name}: another pod has taken over the shard; this one ends",
            )

    def finish(self, metrics: dict[str, float]) -> None:
        """Write the result of the shard, all of whose outputs must be there, in their order, and its manifest last.

        Raises Failure if what was written before is damaged. The next attempt makes it again from there on.
        """
        if self.pending:
            assert self._seal(len(self.pending)), "finish needs all outputs"
        about = {"span": [self.span.start, self.span.stop], "runs": self.runs, "settings": self.settings}
        found = {"kind": self.state.kind, "metrics": metrics, "sums": self.state.sums}
        try:
            self.result.write(self._whole_segments(), about | found)
        except FileNotFoundError as error:
            self._go_back(self.verified, f"{error.filename} is gone")

    def _whole_segments(self) -> Iterator[tuple[Path, bytes]]:
        """Yield the folder of files and the lines of each segment, in order. Raises Failure if one is damaged."""
        good = self.verified = State()
        for piece in self.state.pieces:
            folder, size = self.own(piece.attempt), 0
            with (folder / TABLE).open("rb") as table:
                for entry in self._segments(piece.attempt):
                    if size >= piece.size:
                        break
                    text = table.read(entry["size"])
                    if digest(text) != entry["sha256"]:
                        self._go_back(good, f"{folder / TABLE} is not as it was written")
                    self.verified = good
                    yield folder, text
                    good, size = State.of(entry["state"]), entry["end"]

    def _go_back(self, good: State, what: str) -> NoReturn:
        """Begin an attempt that continues after `good`, the last segment that is whole, and end this one.

        Raises Failure.
        """
        self.state, self.pending = good, {}
        self._begin(self.attempt, [])
        raise Failure(
            ExitCode.STORAGE_ERROR,
            f"{what}; {len(self.span) - good.outputs} of {len(self.span)} outputs of {self.folder.name} are made again",
        )
