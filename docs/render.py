"""Draws the tables of these pages from the code, so that the two cannot disagree: `python docs/render.py` (`--check`
only compares).

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from luthier_api.conditions import ONLY_EVENTS, ConditionType, Reason
from luthier_api.crd import crd
from luthier_api.decides import Changes, Decides, marked_paths
from luthier_api.exitcodes import ExitCode, Retry
from luthier_api.kinds import KINDS, JobKind
from luthier_api.marks import default_text, marked_fields
from luthier_api.matrix import AXES, REFUSALS, Axis
from luthier_api.methods import METHODS, STRATEGIES
from luthier_api.metrics import POD_METRICS, Metric
from luthier_api.optimizers import OPTIMIZERS, OptimizerInfo
from luthier_api.schedules import SCHEDULES
from luthier_api.status import State
from luthier_api.tasks import TRAINING_TASKS, TrainingTask

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COST = {Retry.NEVER: "never retried", Retry.COUNTED: "retried, counted", Retry.FREE: "retried, free"}
# What each end means and what helps; the codes and reasons themselves are the code's.
ADVICE: dict[ExitCode, str] = {
    ExitCode.COMPLETED: "The phase did what it should.",
    ExitCode.INVALID_SPEC: "The manifest asks for something impossible. The message names the field.",
    ExitCode.INVALID_DATASET: (
        "The data do not fit the spec: a column, a label, a split, a file. The message names what was found."
    ),
    ExitCode.NOT_FOUND: "A model, dataset, revision, file or job does not exist.",
    ExitCode.HUB_UNAVAILABLE: "The Hub did not answer. A finished training is published later; nothing is lost.",
    ExitCode.TRAINING_ERROR: "An exception in the phase. Its last lines are in the status and in the log.",
    ExitCode.INFRASTRUCTURE_ERROR: "The machine, its driver or its network failed.",
    ExitCode.STORAGE_ERROR: "The workspace is full, read-only or broken.",
    ExitCode.PREEMPTED: (
        "The cluster or the user stopped the pod. A training has saved a checkpoint if there was time; the next attempt"
        " resumes from the newest."
    ),
    ExitCode.UNAUTHORIZED: "The token is missing, wrong, or without access. See `hub.tokenSecretRef`.",
    ExitCode.MISCONFIGURED: "The environment cannot run this: no GPU, a read-only folder, a missing library.",
    ExitCode.CUDA_OUT_OF_MEMORY: (
        "A training goes on once with half the micro-batch, in the same steps. If that is not enough: smaller"
        " `maxLength`, `gradientCheckpointing: true`, a `zero` strategy, or `method.type: qlora`. What takes how much:"
        " [memory](memory.md)."
    ),
    ExitCode.HANG: "No step for longer than the limit. The stacks of all threads are in the log.",
    ExitCode.PEER_LOST: "Another process of the group ended or became unreachable. Its own attempt has the reason.",
    ExitCode.DIVERGED: (
        "Losses, gradients or weights were not finite any more; the message names the newest good checkpoint. Set a"
        " lower `learningRate` or more `warmupSteps`."
    ),
    ExitCode.HOST_OUT_OF_MEMORY: "More `resources.memory`, or fewer processes on a node.",
    ExitCode.DOES_NOT_FIT: (
        "`prepare` has found no way to train in the memory of the GPUs, or of the pod. The message says what takes how"
        " much, and what would fit: [memory](memory.md)."
    ),
}
STATES: dict[State, str] = {
    State.PENDING: "Waits for JobSet, for a volume, or until stopped pods have ended.",
    State.WAITING: "Waits for the result of another job.",
    State.PREPARING: "Resolves the model, loads the data, plans the run.",
    State.PLANNED: "`planOnly` is true, and the plan is in the status. Set it to false to run the job.",
    State.QUEUED: "Waits to be admitted by its queue (`scheduling.queueName`).",
    State.INADMISSIBLE: "The queue does not exist, or is stopped.",
    State.UNSATISFIABLE: "The quota of the queue cannot meet the request even while nothing else runs.",
    State.DEACTIVATED: "Kueue has stopped the pods, and does not admit the job again by itself; `Admitted` says why.",
    State.STARTING: "The pods of the run are being created and scheduled.",
    State.RUNNING: "The pods train or generate.",
    State.RESTARTING: "A pod has failed; the run restarts from the newest checkpoint or output.",
    State.PUBLISHING: "The result is being uploaded to the Hub.",
    State.SUSPENDED: "`suspend` is true: no pods and no GPUs. Set it to false to resume the job.",
    State.COMPLETE: "All phases are done.",
    State.FAILED: "The job has failed; the condition `Failed` has the reason.",
    State.UNKNOWN: "The job has ended, but its status has lost how. It does not run again by itself.",
}
# When each event is posted. An event that is named like a reason of a condition has the message of that condition.
OCCASIONS: dict[Reason, str] = {
    Reason.ACCEPTED: "The job has stopped waiting: what it needs exists now.",
    Reason.WAITING_FOR_JOB: "The result of another job does not exist yet.",
    Reason.SOURCE_NOT_UNDERSTOOD: "The job whose result is needed exists, but the operator does not understand it.",
    Reason.NOT_UNDERSTOOD: (
        "The spec has a value that the operator does not know. Pods go on; install CRDs and operator from the same"
        " chart."
    ),
    Reason.UNKNOWN_FIELDS: "The spec has fields that the operator does not know and ignores: their paths.",
    Reason.INTERNAL_ERROR: "The operator itself fails with the job: what to report.",
    Reason.STATUS_REFUSED: "The API server refuses the status, so that nothing is created for the job.",
    Reason.JOB_SET_MISSING: "The cluster has no JobSet.",
    Reason.SMALL_WORKSPACE: "The existing claim of an earlier job is used, and is smaller than `workspace.size`.",
    Reason.PREPARING: "`prepare` starts.",
    Reason.PREPARED: "`prepare` has succeeded: model, rows and plan.",
    Reason.PLAN_ONLY: "`prepare` has succeeded, and with `planOnly` the job stops there.",
    Reason.FAILED_CREATE: "The API server refuses to create a child.",
    Reason.NO_PODS: "The cluster creates no pods for a Job or JobSet: why, such as a quota, and what helps.",
    Reason.UNSCHEDULABLE: "No node has what a pod requests.",
    Reason.WAITING_FOR_QUEUE: "The job waits to be admitted by its queue.",
    Reason.ADMITTED: "Its queue admits the job; the pods start.",
    Reason.EVICTED: (
        "Kueue has stopped the pods: its reason (`Preempted`, `PodsReadyTimeout`, ...) and message. The run resumes"
        " from its checkpoint when it is admitted again."
    ),
    Reason.DEACTIVATED: "Kueue has stopped the pods, and does not admit the job again by itself: why, and what to do.",
    Reason.INADMISSIBLE: "The queue does not exist, or is stopped.",
    Reason.UNSATISFIABLE: "The quota of the queue cannot meet the request even while nothing else runs.",
    Reason.WAITING_FOR_KUEUE: "The JobSet or Job is suspended, but Kueue has made no Workload for it.",
    Reason.NOT_QUEUED: "The job names a queue, but nothing held its pods back: Kueue does not manage them.",
    Reason.RUNS_ELSEWHERE: "MultiKueue runs the JobSet or Job in another cluster.",
    Reason.WAITING_FOR_VOLUME: "A claim is missing or not bound: the field that names it, and what helps.",
    Reason.CONTAINER_CREATING: "A pod was scheduled, but its container has not started.",
    Reason.IMAGE_PULL_FAILED: "An image cannot be pulled.",
    Reason.STARTED: "The pods run for the first time.",
    Reason.RESTARTING: "The run restarts: number of the restart, and the failure before it.",
    Reason.RUNNING: "The pods run again, or make progress again.",
    Reason.NO_STEP: "A pod runs, but has made no progress for minutes.",
    Reason.PROGRESS_UNKNOWN: "A pod runs, but its metrics cannot be read: whether it makes progress is unknown.",
    Reason.NOTICE: (
        "Nothing has failed, but something was left out, changed, newly initialised or chosen. All notices are in"
        " `status.notices`."
    ),
    Reason.CHECKPOINT_BROKEN: (
        "A checkpoint does not match its manifest and was set aside: where it is, and from which step the run resumes."
    ),
    Reason.TRAINED: "The training has succeeded.",
    Reason.GENERATED: "The generation has succeeded.",
    Reason.PUBLISHING: "`publish` starts, or starts again.",
    Reason.PUBLISH_FAILED: "A pod of `publish` has failed; it is retried if that may help.",
    Reason.PUBLISHED: "The result is on the Hub.",
    Reason.SUSPENDED: "`suspend` is true.",
    Reason.RESUMED: "The job resumes: `suspend` is false again, or a field was changed after it had failed; which one.",
    Reason.COMPLETED: "The job is complete: where the result is.",
    Reason.FAILED: "The job has failed: the reason, and what to do.",
}


def table(heads: Sequence[str], rows: Iterator[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return (
        "\n".join(
            [
                *lines,
                *(
                    "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
                    for row in rows
                ),
            ]
        )
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
    return ", ".join(f"`{r}`" for r in Reason if r not in codes | ONLY_EVENTS) + "\n"


def changes() -> str:
    """The fields that may change once a job exists, apart from its life cycle."""
    when = {
        Changes.WHILE_STOPPED: "while the job is suspended, planned, or has failed",
        Changes.ALWAYS: "at any time",
    }
    paths: dict[str, Decides] = {}
    for info in KINDS.values():
        paths |= marked_paths(info.spec)
    rows = [
        (", ".join(f"`{path}`" for path, known in paths.items() if known is mark), when[mark.value.changes])
        for mark in Decides
        if mark.value.resumes
    ]
    return table(("fields", "change"), iter(rows))


def states() -> str:
    return table(("STATE", "the job"), ((f"`{s}`", STATES[s]) for s in State))


def events() -> str:
    from luthier_operator.announce import EVENTS

    return table(
        ("event", "type", "when"), ((f"`{reason}`", kind, OCCASIONS[reason]) for reason, kind in EVENTS.items())
    )


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
        ("variable", "default", "meaning"),
        ((f"`LUTHIER_{n.upper()}`", default(f.default), " ".join((f.description or "").split())) for n, f in fields),
    )


def fields(kind: JobKind) -> str:
    spec = crd(kind, KINDS[kind])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    model = KINDS[kind].spec
    by_table = {f"spec.{field.path}": default_text(model, field) for field in marked_fields(model)}
    return table(("field", "type", "default", "meaning"), walk(spec, "spec", by_table))


def walk(node: dict[str, Any], path: str, by_table: dict[str, str]) -> Iterator[Sequence[object]]:
    """The rows of all fields below `node`. `by_table`: path → default, of the fields whose default a table has."""
    for name, below in node.get("properties", {}).items():
        here = f"{path}.{name}"
        default = ""
        if name in node.get("required", []):
            default = "required"
        elif "default" in below and "properties" not in below:
            default = f"`{json.dumps(below['default'])}`"
        elif by_table.get(here):
            default = f"`{by_table[here]}`"
        kind = " ".join(f"`{v}`" for v in below["enum"]) if "enum" in below else below.get("type", "integer or string")
        yield (f"`{here}`", kind, default, below.get("description", ""))
        yield from walk(below, here, by_table)
        if isinstance(below.get("items"), dict):
            yield from walk(below["items"], f"{here}[]", by_table)


def schedules() -> str:
    def options(names: Iterable[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    return table(
        ("schedule", "the learning rate", "`scheduleOptions`"),
        ((f"`{name}`", schedule.shape, options(schedule.options)) for name, schedule in SCHEDULES.items()),
    )


def optimizers() -> str:
    return table(
        ("optimizer", "what it is", "works with"),
        ((f"`{name}`", optimizer.about, limits(optimizer)) for name, optimizer in OPTIMIZERS.items()),
    )


def limits(optimizer: OptimizerInfo) -> str:
    """What an optimiser works with, where it does not work with all."""
    found = []
    if optimizer.strategies != STRATEGIES:
        found.append(f"strategy {', '.join(optimizer.strategies)}")
    if optimizer.methods != tuple(METHODS):
        found.append(f"method {', '.join(optimizer.methods)}")
    if optimizer.schedules != tuple(SCHEDULES):
        found.append(f"schedule {', '.join(optimizer.schedules)}")
    return "; ".join(found) or "all"


def tasks() -> str:
    def columns(task: TrainingTask) -> str:
        named = [f"`{role}`" for role in task.columns] + [f"(`{role}`)" for role in task.optional_columns]
        return ", ".join(named)

    return table(
        ("task", "columns", "block", "metrics beside the loss"),
        (
            (
                f"`{name}`",
                columns(task),
                f"`{task.settings}`" if task.settings else "",
                ", ".join(f"`{metric.name}`" for metric in task.metrics),
            )
            for name, task in TRAINING_TASKS.items()
        ),
    )


def matrix() -> str:
    """A table for each two choices of a FineTuneJob of which some do not work together, with the reasons below."""
    reasons = list(dict.fromkeys(refusal.reason for refusal in REFUSALS))
    known = {(refusal.first, refusal.second): reasons.index(refusal.reason) + 1 for refusal in REFUSALS}
    parts = []
    for rows, columns in combinations(AXES, 2):
        if not any(one[0] == rows.name and other[0] == columns.name for one, other in known):
            continue

        def cell(row: str, column: str, rows: Axis = rows, columns: Axis = columns) -> str:
            number = known.get(((rows.name, row), (columns.name, column)))
            return f"no ({number})" if number else "yes"

        heads = (f"`{rows.path}` \\ `{columns.path}`", *(f"`{value}`" for value in columns.values))
        lines = ((f"`{row}`", *(cell(row, column) for column in columns.values)) for row in rows.values)
        parts.append(table(heads, lines))
    listed = "".join(f"{number}. {reason[0].upper()}{reason[1:]}.\n" for number, reason in enumerate(reasons, 1))
    return "\n".join([*parts, listed])


TABLES: dict[str, Callable[[], str]] = {
    "tasks": tasks,
    "matrix": matrix,
    "schedules": schedules,
    "optimizers": optimizers,
    "exit-codes": exit_codes,
    "conditions": conditions,
    "reasons": reasons,
    "states": states,
    "changes": changes,
    "events": events,
    "pod-metrics": pod_metrics,
    "operator-metrics": operator_metrics,
    "settings": settings,
    "finetunejob": lambda: fields(JobKind.FINE_TUNE),
    "generatejob": lambda: fields(JobKind.GENERATE),
}


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
