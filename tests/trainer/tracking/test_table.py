"""Each tracker of the API has an implementation, and `prepare` refuses one that the image cannot serve."""

from __future__ import annotations

from typing import Any

import pytest

from luthier_api.trackers import TRACKERS, TrackerInfo
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tracking import table


def test_each_row_has_an_implementation() -> None:
    assert set(table.IMPLEMENTATIONS) == set(TRACKERS)
    assert all(callable(table.implementation(name).send) for name in TRACKERS)


def test_an_image_without_the_package(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = TrackerInfo(title="TensorBoard", package="not_in_this_image", distribution="not-in-this-image")
    monkeypatch.setattr(table, "TRACKERS", {"tensorboard": absent})
    with pytest.raises(Failure) as failed:
        prepare.main(make_run(tracking=[{"type": "tensorboard"}]))
    assert failed.value.message == (
        "spec.tracking: tensorboard needs the Python package not-in-this-image, which the trainer image does not have;"
        " use an image with it (the chart's value trainer.image; see Trackers in docs/training.md), or remove this"
        " tracker"
    )
