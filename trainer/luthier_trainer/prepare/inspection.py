"""Describes the dataset of a FineTuneJob without a training: `python -m luthier_trainer.prepare.inspection RUN FOLDER`.

Rows are read and encoded as `prepare` does, but not truncated. Of the model only the tokenizer and the configuration
are read, no weights. The description is one JSON document on stdout; everything else is on stderr.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.run import FineTuneRun, read_run
from luthier_trainer.data import parallel
from luthier_trainer.data.load import Rows
from luthier_trainer.models import sources
from luthier_trainer.models.inspect import max_positions, read_config
from luthier_trainer.prepare import data_report, first_row, streamed
from luthier_trainer.prepare.examples import read_examples
from luthier_trainer.prepare.training import MODEL, encode
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.table import task_of
from luthier_trainer.tasks.texts import TextTask

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

COVERED = 99.5  # percent of the rows that the recommended maxLength does not cut
MULTIPLE = 64  # tokens
UNCUT = 1_048_576  # tokens, the most that training.maxLength can be


def inspect(run: FineTuneRun, folder: Path) -> dict[str, Any]:
    """Return the description of the dataset. `folder`: for downloads. Raises Failure if it cannot be learnt from."""
    import datasets

    datasets.disable_progress_bars()
    task = task_of(run.spec)
    parallel.use(parallel.asked(run.spec.prepare))
    read_rows = streamed.read_examples if run.spec.dataset.streaming else read_examples
    examples = read_rows(task, run, folder / "cache")
    added_tokens = 0
    found: dict[str, Any] = {
        "columns": {name: _kind(examples.train, name) for name in examples.train.names},
        "splits": {name: _size(rows) for name, rows in examples.splits.items()},
    }
    if examples.train.form is not None:
        found["form"] = examples.train.form.name
    if isinstance(task, TextTask) and run.spec.model.config is None:
        model = sources.locate(run.spec.model, run, MODEL).fetch_texts(folder / "model")
        tokenizer = task.read_processor(model, MODEL)
        training = run.spec.training.model_copy(update={"max_length": UNCUT, "packing": None})
        spec = run.spec.model_copy(update={"training": training})
        encoded = encode(task, examples, tokenizer, spec)
        for name, rows in encoded.items():
            found["splits"][name] |= _tokens(rows)
        lengths = _lengths(encoded["train"])
        found["recommendedMaxLength"] = recommended(lengths, max_positions(read_config(model, MODEL)))
        added_tokens = task.added_tokens(tokenizer)
        row = first_row.described(encoded["train"], tokenizer, task.shown)
        found["firstRow"] = row and first_row.told(row)
    report = data_report.describe(task, examples, run.spec, added_tokens)
    found |= {"report": report, "reportTable": data_report.table(report)}
    return found | {"notices": notices.given()}


def recommended(lengths: numpy.ndarray, most: int | None) -> int:
    """Return a maxLength that cuts few rows: a multiple of `MULTIPLE`, at most `most`, the positions of the model.

    `lengths`: tokens of each row. The longest row decides if it is hardly longer than nearly all others.
    """
    import numpy

    nearly_all, longest = (-(-int(n) // MULTIPLE) * MULTIPLE for n in numpy.percentile(lengths, [COVERED, 100]))
    chosen = longest if longest <= 1.25 * nearly_all else nearly_all
    return min(chosen, most or chosen)


def _kind(rows: Rows, column: str) -> str:
    if column in rows.mixed:
        return rows.mixed[column]
    kinds = (("text", rows.texts), ("images", rows.images), ("lists", rows.lists))
    return next((kind for kind, names in kinds if column in names), "other values")


def _size(rows: Rows) -> dict[str, Any]:
    sizes = [Path(origin.path).stat().st_size for origin in rows.origins if Path(origin.path).is_file()]
    return {"rows": len(rows.data)} | ({"bytes": sum(sizes)} if sizes else {})


def _tokens(rows: Dataset) -> dict[str, int]:
    found = {"encodedRows": len(rows), "tokens": int(_lengths(rows).sum())}
    if "loss_mask" in rows.column_names:
        batches = (rows[start : start + 1000]["loss_mask"] for start in range(0, len(rows), 1000))
        found["labels"] = sum(sum(mask) for batch in batches for mask in batch)
    return found


def _lengths(rows: Dataset) -> numpy.ndarray:
    """Return the number of tokens of each row, int64 of shape (rows,); of a pair, those of the longer text."""
    import numpy

    if "length" in rows.column_names:
        return numpy.asarray(rows["length"][:], dtype=numpy.int64)
    if "input_ids" in rows.column_names:
        return numpy.array([len(ids) for ids in rows["input_ids"]], dtype=numpy.int64)
    pairs = zip(rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return numpy.array([len(p) + max(len(c), len(r)) for p, c, r in pairs], dtype=numpy.int64)


def main(run_file: str, folder: str) -> int:
    """Print the description; return the exit code."""
    with contextlib.redirect_stdout(sys.stderr):
        run = read_run(Path(run_file).read_bytes())
        assert isinstance(run, FineTuneRun), "the command has checked the kind"
        try:
            found = inspect(run, Path(folder))
        except Failure as failure:
            print(failure.message, file=sys.stderr)
            return int(failure.code)
    print(json.dumps(found, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
