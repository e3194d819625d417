"""What `luthier run` shows people: phases, a progress bar, what was found, a summary. For scripts it stays silent on
stdout.

Neighbours: `runner` tells it what happens. On something that is no terminal the bar becomes a line now and then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from luthier_api import status
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Phase, Prepared
from luthier_api.termination import TerminationMessage
from luthier_cli.local import LocalJob
from luthier_cli.runner import Outcome

LINE_PERCENT = 10  # of progress between two lines where there is no terminal
SAMPLES, SAMPLE_CHARACTERS = 3, 600
DOING: dict[Phase, str] = {"prepare": "preparing", "run": "running", "publish": "publishing"}


class Screen:
    """One job's display; the watcher of `run_job`."""

    def __init__(self, console: Console, job: LocalJob) -> None:
        self.console, self.job = console, job
        self.bar: Progress | None = None
        self.line = -LINE_PERCENT
        self.started = 0.0
        self.shown = False
        """What `prepare` found."""
        console.print(f"\n[bold]{job.kind} {job.name}[/]  [dim]{escape(_short(job.folder.root))}[/]")

    def began(self, phase: Phase, detail: str) -> None:
        title = f"{DOING[phase]}{f', {detail}' if detail else ''}"
        self.line, self.started = -LINE_PERCENT, time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"  {title}")
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[says]}"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.bar.add_task(f"  {title}", total=None, says="")
        self.bar.start()

    def progress(self, progress: status.Progress) -> None:
        says = describe(progress)
        if self.bar:
            done, total = (
                (progress.step, progress.max_steps) if progress.max_steps else (progress.rows, progress.max_rows)
            )
            self.bar.update(self.bar.task_ids[0], completed=done, total=total, says=says)
        elif (progress.percent or 0) >= self.line + LINE_PERCENT:
            self.line = progress.percent or 0
            self.console.print(f"    {self.line:3d} %  {says}", highlight=False)

    def ended(self, phase: Phase, message: TerminationMessage) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
        good = message.code == ExitCode.COMPLETED
        mark = "[green]✓[/]" if good else "[yellow]■[/]" if message.code == ExitCode.PREEMPTED else "[red]✗[/]"
        self.console.print(f"  {mark} {phase} [dim]{time.monotonic() - self.started:.1f} s[/]", highlight=False)
        if good and message.prepared:
            self.show(message.prepared)
        self.show_notices(message.notices)

    def show(self, prepared: Prepared) -> None:
        self.shown = True
        self.console.print(found(prepared, self.job.workload.row_noun))

    def show_notices(self, notices: Sequence[str]) -> None:
        for text in notices:
            self.console.print(f"  [yellow]![/] {escape(text)}", highlight=False)

    def stopping(self, hard: bool) -> None:
        self.console.print("  ending everything" if hard else "  stopping: a checkpoint first (again to end at once)")

    def summary(self, outcome: Outcome) -> None:
        """Where the job stands and what it has brought."""
        job, end = outcome.job, outcome.message
        if outcome.finished_before:
            self.console.print("  finished before: nothing was run, and nothing looked at again; --fresh starts over")
        elif outcome.state == "Planned" and not self.shown:
            self.console.print("  prepared before: nothing was looked at again; --fresh starts over")
        if outcome.state == "Planned" and outcome.prepared and not self.shown:
            self.show(outcome.prepared)
            self.show_notices(outcome.notices)
        if outcome.state == "Complete":
            self.console.print(results(outcome))
            for sample in samples(job):
                self.console.print(sample)
        elif outcome.state == "Suspended":
            self.console.print("  spec.suspend is true: nothing was started")
        elif outcome.state == "Stopped" and end:
            self.console.print(
                f"  [yellow]stopped[/] ({end.code}):"
                f" {escape(end.message) or 'the same command goes on where it stopped'}"
            )
        elif outcome.state == "Failed" and end:
            self.console.print(f"  [red]{end.reason}[/] ({end.code}): {escape(end.message)}", highlight=False)
            if end.last_lines and ExitCode.of(end.code) not in (
                ExitCode.INVALID_SPEC,
                ExitCode.INVALID_DATASET,
                ExitCode.NOT_FOUND,
            ):
                self.console.print(
                    "".join(f"    [dim]{escape(line)}[/]\n" for line in end.last_lines.splitlines()[-15:]).rstrip()
                )
            self.console.print(f"  logs: {escape(_short(job.log('x').parent))}", highlight=False)


def describe(progress: status.Progress) -> str:
    """`step 120/400  loss 2.31  5,210 tokens/s  38 s left`."""
    parts = []
    if progress.max_steps:
        parts.append(f"step {progress.step}/{progress.max_steps}")
    if progress.max_rows:
        parts.append(f"{progress.rows}/{progress.max_rows} outputs")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    elif progress.rows_per_second:
        parts.append(f"{progress.rows_per_second:,.1f} rows/s")
    if progress.eta_seconds is not None:
        parts.append(f"{duration(progress.eta_seconds)} left")
    return "  ".join(parts)


def found(prepared: Prepared, row_noun: str) -> Table:
    """What `prepare` found and planned."""
    plan, data = prepared.plan, prepared.dataset
    revision = f" @ {prepared.model.revision[:12]}" if prepared.model.revision else ""
    weights = f", {plan.parameters:,} weights" if plan.parameters else ""
    rows = [f"{data.rows:,} {row_noun}"]
    if data.eval_rows:
        rows.append(f"{data.eval_rows:,} held out")
    if data.tokens:
        rows.append(f"{data.tokens:,} tokens")
    if data.labels:
        rows.append(f"{len(data.labels)} classes")
    planned = [
        f"{plan.steps:,} steps" if plan.steps else "",
        f"{plan.world_size} process{'es' if plan.world_size > 1 else ''}",
    ]
    planned += [plan.strategy if plan.strategy != "none" else "", plan.precision or ""]
    if plan.micro_batch_size:
        planned.append(f"batch {plan.micro_batch_size} × {plan.accumulation_steps or 1} × {plan.world_size}")
    planned.append("activations recomputed" if plan.gradient_checkpointing else "")
    table = _table()
    table.add_row("model", escape(f"{_short(prepared.model.source)}{revision}{weights}"))
    for adapter in prepared.adapters:
        table.add_row("adapter", escape(_short(adapter.source)))
    table.add_row("data", ", ".join(rows))
    table.add_row("plan", ", ".join(p for p in planned if p))
    for reason in plan.reasons:
        table.add_row("", escape(reason))
    if plan.checkpoint_bytes and plan.save_seconds:
        saved = f"{plan.checkpoint_bytes / 1e6:,.0f} MB, saved in about {duration(plan.save_seconds)}"
        table.add_row("checkpoint", f"{saved}; a pod that is stopped needs {plan.grace_seconds} s")
    return table


def results(outcome: Outcome) -> Table:
    """Figures and places of a finished job."""
    figures = outcome.metrics or {}
    table = _table()
    before, after = figures.get("evalLossBefore"), figures.get("evalLoss")
    if before is not None and after is not None:
        table.add_row(
            "held-out loss",
            f"[bold]{before:.3f} → {after:.3f}[/]"
            + (f"  (perplexity {p:.1f})" if (p := figures.get("perplexity")) else ""),
        )
    if (accuracy := figures.get("accuracy")) is not None:
        share = figures.get("majorityShare")
        table.add_row(
            "accuracy",
            f"{accuracy:.3f}" + (f"  (the most frequent class alone: {share:.3f})" if share is not None else ""),
        )
    steps, tokens, seconds = (figures.get(k) for k in ("steps", "tokens", "seconds"))
    if steps and seconds:
        table.add_row(
            "trained",
            f"{steps:,.0f} steps" + (f", {tokens:,.0f} tokens" if tokens else "") + f" in {duration(seconds)}",
        )
    if (made := figures.get("rows")) is not None:
        failed = figures.get("failedRows", 0)
        table.add_row(
            "outputs",
            f"{made:,.0f}"
            + (
                f"; [bold]{failed:,.0f} could not be made[/]: see the lines with an error in the result"
                if failed
                else ""
            ),
        )
    table.add_row("result", escape(_short(outcome.job.folder.result)))
    if outcome.hub:
        table.add_row("published", escape(f"{outcome.hub['url']} @ {str(outcome.hub['revision'])[:12]}"))
    return table


def samples(job: LocalJob) -> list[str]:
    """The first texts of a GenerateJob; none where it makes images."""
    texts = []
    for shard in sorted(job.folder.result.glob("shard-*.jsonl")):
        # Splitlines() would also split at U+2028, which a text may hold
        for line in filter(None, shard.read_text().split("\n")):
            row = json.loads(line)
            if text := row.get("text"):
                said = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " ..."
                prompt, said = (escape(t.replace("\n", "\n    ")) for t in (str(row.get("prompt", "")), said))
                texts.append((row.get("row", 0), f"\n    [cyan]{prompt}[/][dim]▸[/]{said}"))
    return [text for _, text in sorted(texts)[:SAMPLES]]


def intent(job: LocalJob) -> dict[str, Any]:
    """What a run would do, before anything is looked up."""
    spec = job.manifest.job.spec
    work = job.workload
    run = {"pods": work.pods, "atOnce": len(work.groups[0]), **work.describe_processes()}
    return {
        "name": job.name,
        "kind": job.kind.value,
        "task": spec.task,
        "phases": list(job.phases),
        "folder": str(job.folder.root),
        "run": run,
        "uses": list(work.sources.values()),
        "publishesTo": spec.hub.repo if spec.hub else None,
    }


def duration(seconds: float) -> str:
    """`38 s`, `4 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 4))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _short(path: str | Path) -> str:
    """Relative to here, where that is shorter."""
    text = str(path)
    here = f"{Path.cwd()}/"
    return text.removeprefix(here)
