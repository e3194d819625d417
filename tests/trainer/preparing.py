"""What the tests of `prepare` share."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict, load_from_disk

from luthier_api.run import FineTuneRun
from luthier_trainer.prepare.main import main
from luthier_trainer.workspace.prepared import read_prepared


def prepared(run: FineTuneRun) -> tuple[Any, DatasetDict]:
    """(record, rows as `train` reads them) after `prepare`."""
    main(run)
    record = read_prepared(run)
    return record, load_from_disk(record.dataset_path)
