"""Draws the tables of these pages from the code, so that the two cannot disagree: `python docs/render.py` (`--check` only compares).

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Neighbour: `tests/unit/test_docs.py`, which runs the check.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from luthier_api.conditions import ConditionType, Reason
from luthier_api.crd import crd
from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.kinds import KINDS, JobKind
from luthier_api.metrics import POD_METRICS, Metric

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COST = {Retry.NEVER: "never retried", Retry.COUNTED: "retried, counted", Retry.FREE: "retried, free"}
# What each end means and what helps; the codes and reasons themselves are the code's.
ADVICE: dict[ExitCode, str] = {
    ExitCode.COMPLETED: "The phase did what it should.",
    ExitCode.INVALID_SPEC: "The manifest asks for something that cannot be. The message names the field.",
    ExitCode.INVALID_DATASET: "The data do not fit: a column, a label, a split, a file. The message names what was found.",
    ExitCode.NOT_FOUND: "A model, dataset, revision, file or job is not there.",
    ExitCode.HUB_UNAVAILABLE: "The Hub did not answer. A finished training waits for it; nothing is lost.",
    ExitCode.TRAINING_ERROR: "An exception in the phase. Its last lines are in the status and in the log.",
    ExitCode.INFRASTRUCTURE_ERROR: "The machine, its driver or its network failed.",
    ExitCode.STORAGE_ERROR: "The workspace is full, read-only or broken.",
    ExitCode.PREEMPTED: "Stopped from outside. Training had saved a checkpoint if it could; the next attempt goes on from the newest.",
    ExitCode.UNAUTHORIZED: "The token is missing, wrong, or without access. See `hub.tokenSecret`.",
    ExitCode.MISCONFIGURED: "The place cannot run this: no GPU, a folder that cannot be written, a missing library.",
    ExitCode.CUDA_OUT_OF_MEMORY: "Smaller `microBatchSize` or `maxLength`, `gradientCheckpointing`, a `zero` strategy, or `method.type: qlora`.",
    ExitCode.HANG: "No step for longer than the limit. The stacks of all threads are in the log.",
    ExitCode.PEER_LOST: "Another process of the group went away. Its own end says why.",
    ExitCode.DIVERGED: "The loss stopped being a number. A lower `learningRate` or more `warmupSteps`.",
    ExitCode.HOST_OUT_OF_MEMORY: "More `resources.memory`, or fewer processes on a node.",
}


def table(heads: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return (
        "\n".join([*lines, *("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows)])
        + "\n"
    )


def exit_codes() -> str:
    return table(
        ("code", "reason", "cost", "what it means, what helps"),
        ((int(c), f"`{c.reason}`", COST[c.retry] if c else "", ADVICE[c]) for c in ExitCode),
    )


def conditions() -> str:
    return ", ".join(f"`{c}`" for c in ConditionType) + "\n"


def reasons() -> str:
    codes = {c.reason for c in ExitCode}
    return ", ".join(f"`{r}`" for r in Reason if r not in codes) + "\n"


def metrics(found: Sequence[Metric]) -> str:
    def labels(metric: Metric) -> str:
        return ", ".join(f"`{label}`" for label in getattr(metric, "labels", ()))

    return table(("metric", "type", "labels", "meaning"), ((f"`{m.name}`", m.type, labels(m), m.help) for m in found))


def pod_metrics() -> str:
    return metrics(POD_METRICS)


def operator_metrics() -> str:
    from luthier_operator.metrics import OPERATOR_METRICS

    return metrics(OPERATOR_METRICS)


def settings() -> str:
    from luthier_operator.settings import Settings

    def default(value: Any) -> str:
        return "" if value in (None, "", ()) else f"`{value}`"

    fields = Settings.model_fields.items()
    return table(
        ("variable", "default", "meaning"), ((f"`LUTHIER_{n.upper()}`", default(f.default), f.description or "") for n, f in fields)
    )


def fields(kind: JobKind) -> str:
    spec = crd(kind, KINDS[kind])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return table(("field", "type", "default", "meaning"), walk(spec, "spec"))


def walk(node: dict[str, Any], path: str) -> Iterator[Sequence[object]]:
    for name, below in node.get("properties", {}).items():
        here = f"{path}.{name}"
        scalar = below["type"] not in ("object", "array") or "properties" not in below
        default = (
            f"`{json.dumps(below['default'])}`" if "default" in below and scalar else "required" if name in node.get("required", []) else ""
        )
        kind = " ".join(f"`{v}`" for v in below["enum"]) if "enum" in below else below["type"]
        yield (f"`{here}`", kind, default, below.get("description", ""))
        yield from walk(below, here)
        if isinstance(below.get("items"), dict):
            yield from walk(below["items"], f"{here}[]")


TABLES: dict[str, Callable[[], str]] = {
    "exit-codes": exit_codes, "conditions": conditions, "reasons": reasons, "pod-metrics": pod_metrics, "operator-metrics": operator_metrics,
    "settings": settings, "finetunejob": lambda: fields(JobKind.FINE_TUNE), "generatejob": lambda: fields(JobKind.GENERATE),
}  # fmt: skip


def render(text: str) -> str:
    """`text` with its tables drawn anew. Raises KeyError for a table that nobody draws."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main(check: bool) -> int:
    stale = [page for page in sorted(DOCS.glob("*.md")) if render(page.read_text()) != page.read_text()]
    for page in stale:
        if check:
            print(f"not current: docs/{page.name}. Run `python docs/render.py`.", file=sys.stderr)
        else:
            page.write_text(render(page.read_text()))
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main(check="--check" in sys.argv[1:]))
