"""Methods as a job has them: with the defaults that the tables give."""

from __future__ import annotations

from typing import Any

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.method import Method


def method_of(**fields: Any) -> Method:
    """The method of a job whose `method` has these fields."""
    document = {"task": "causal-lm", "model": {"path": "/m"}, "dataset": {"files": ["/d.txt"]}, "method": fields}
    return FineTuneJobSpec.model_validate(document).method
