"""What `luthier run` displays: phases, a progress bar, what `prepare` found, and a summary.

Without a terminal, lines of progress replace the bar.
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
from luthier_api.marks import settings_of
from luthier_api.status import Phase, Prepared
from luthier_api.tasks import TRAINING_TASKS
from luthier_api.termination import TerminationMessage
from luthier_cli.local import LocalJob
from luthier_cli.runner import Outcome

LINE_PERCENT = 10  # of progress between two lines, without a terminal
SAMPLES, SAMPLE_CHARACTERS = 3, 600
WITH_OWN_LINE = ("perplexity", "accuracy", "f1Macro", "majorityShare")  # metrics beside the loss or the accuracy
LINES_OF_OUTPUT = 15  # of a process that failed
EXPLAINED_BY_MESSAGE = (ExitCode.INVALID_SPEC, ExitCode.INVALID_DATASET, ExitCode.NOT_FOUND)  # without its output
MARKS: dict[int, str] = {ExitCode.COMPLETED: "[green]✓[/]", ExitCode.PREEMPTED: "[yellow]■[/]"}
DOING: dict[Phase, str] = {"prepare": "preparing", "run": "running", "publish": "publishing"}


class Screen:
    """The display of one job: the watcher of `run_job`."""

    def __init__(self, console: Console, job: LocalJob) -> None:
        self.console, self.job = console, job
        self.bar: Progress | None = None
        self.line = -LINE_PERCENT
        self.started = 0.0
        self.shown = False
        """Whether the result of `prepare` was displayed."""
        console.print(f"\n[bold]{job.kind} {job.name}[/]  [dim]{escape(_short(job.folder.root))}[/]")

    def began(self, phase: Phase, detail: str) -> None:
        title = f"{DOING[phase]}, {detail}" if detail else DOING[phase]
        self.line, self.started = -LINE_PERCENT, time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"  {title}")
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.bar.add_task(f"  {title}", total=None, figures="")
        self.bar.start()

    def progress(self, progress: status.Progress) -> None:
        figures = describe(progress)
        if self.bar:
            done, total = progress.rows, progress.max_rows
            if progress.max_steps:
                done, total = progress.step, progress.max_steps
            self.bar.update(self.bar.task_ids[0], completed=done, total=total, figures=figures)
        elif (progress.percent or 0) >= self.line + LINE_PERCENT:
            self.line = progress.percent or 0
            self.console.print(f"    {self.line:3d} %  {figures}", highlight=False)

    def ended(self, phase: Phase, message: TerminationMessage) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
        succeeded = message.code == ExitCode.COMPLETED
        mark = MARKS.get(message.code, "[red]✗[/]")
        self.console.print(f"  {mark} {phase} [dim]{time.monotonic() - self.started:.1f} s[/]", highlight=False)
        if succeeded and message.prepared:
            self.show(message.prepared)
        self.show_notices(message.notices)

    def show(self, prepared: Prepared) -> None:
        self.shown = True
        self.console.print(found(prepared, self.job.workload.row_noun, settings_of(self.job.manifest.job.spec)))

    def show_notices(self, notices: Sequence[str]) -> None:
        for text in notices:
            self.console.print(f"  [yellow]![/] {escape(text)}", highlight=False)

    def stopping(self, hard: bool) -> None:
        self.console.print(
            "  stopping at once" if hard else "  stopping after a checkpoint (Ctrl-C again stops at once)"
        )

    def summary(self, outcome: Outcome) -> None:
        """How the job ended, and its results."""
        job, end = outcome.job, outcome.message
        if outcome.finished_before:
            self.console.print("  already finished: nothing was run or checked again; --fresh starts over")
        elif outcome.state == "Planned" and not self.shown:
            self.console.print("  already prepared: nothing was checked again; --fresh starts over")
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
                f" {escape(end.message) or 'the same command resumes where it stopped'}"
            )
        elif outcome.state == "Failed" and end:
            self.console.print(f"  [red]{end.reason}[/] ({end.code}): {escape(end.message)}", highlight=False)
            if end.code not in EXPLAINED_BY_MESSAGE:
                for line in end.last_lines.splitlines()[-LINES_OF_OUTPUT:]:
                    self.console.print(f"    [dim]{escape(line)}[/]")
            self.console.print(f"  logs: {escape(_short(job.log('x').parent))}", highlight=False)


def describe(progress: status.Progress) -> str:
    """`step 120/400  loss 2.31  5,210 tokens/s  38 s left`."""
    parts = []
    if progress.max_steps:
        parts.append(f"step {progress.step}/{progress.max_steps}")
    if progress.max_rows:
        parts.append(f"{progress.rows}/{progress.max_rows} outputs")
    if progress.failed_rows:
        parts.append(f"{progress.failed_rows} failed")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    elif progress.rows_per_second:
        parts.append(f"{progress.rows_per_second:,.1f} rows/s")
    if progress.eta_seconds is not None:
        parts.append(f"{duration(progress.eta_seconds)} left")
    return "  ".join(parts)


def found(prepared: Prepared, row_noun: str, settings: dict[str, Any]) -> Table:
    """What `prepare` found and planned. `row_noun`: what it has counted. `settings`: those that depend on task and
    method, with their defaults.
    """
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
    planned = []
    if plan.steps:
        planned.append(f"{plan.steps:,} steps")
    planned.append("1 process" if plan.world_size == 1 else f"{plan.world_size} processes")
    if plan.strategy != "none":
        planned.append(plan.strategy)
    if plan.precision:
        planned.append(plan.precision)
    if plan.micro_batch_size:
        planned.append(f"batch {plan.micro_batch_size} × {plan.accumulation_steps or 1} × {plan.world_size}")
    if plan.gradient_checkpointing:
        planned.append("activations recomputed")
    table = _table()
    table.add_row("model", escape(f"{_short(prepared.model.source)}{revision}{weights}"))
    for adapter in prepared.adapters:
        table.add_row("adapter", escape(_short(adapter.source)))
    table.add_row("data", ", ".join(rows))
    table.add_row("settings", escape(", ".join(f"{path} {plain(value)}" for path, value in settings.items())))
    table.add_row("plan", ", ".join(planned))
    for reason in plan.reasons:
        table.add_row("", escape(reason))
    if plan.memory and plan.memory.gpu_bytes:
        terms = ", ".join(f"{name} {gigabytes(size)}" for name, size in plan.memory.gpu.items())
        table.add_row("memory", f"{gigabytes(plan.memory.gpu_bytes)} of each GPU: {terms}")
    if plan.seconds and plan.gpu_hours is not None:
        table.add_row("time", f"about {duration(plan.seconds)} for all steps, {plan.gpu_hours:,.3g} GPU-hours")
    if plan.data_bytes:
        table.add_row("prepared data", gigabytes(plan.data_bytes))
    if plan.checkpoint_bytes and plan.save_seconds:
        saved = f"{plan.checkpoint_bytes / 1e6:,.0f} MB, saved in about {duration(plan.save_seconds)}"
        table.add_row("checkpoint", f"{saved}; a stopped pod needs {plan.grace_seconds} s")
    return table


def results(outcome: Outcome) -> Table:
    """Metrics of a finished job, and where its result is."""
    metrics = outcome.metrics or {}
    table = _table()
    if loss := held_out_loss(metrics):
        table.add_row("held-out loss", loss)
    if "accuracy" in metrics:
        table.add_row("accuracy", accuracy(metrics))
    for name, value in other_metrics(metrics).items():
        table.add_row(name, f"{value:.3f}")
    if trained := training(metrics):
        table.add_row("trained", trained)
    if "rows" in metrics:
        table.add_row("outputs", outputs(metrics))
    table.add_row("result", escape(_short(outcome.job.folder.result)))
    for run in outcome.tracking:
        shown = run.url or _short(outcome.job.folder.root / run.run)
        table.add_row("tracked", escape(f"{shown} ({run.type})"))
    if outcome.hub:
        table.add_row("published", escape(f"{outcome.hub['url']} @ {str(outcome.hub['revision'])[:12]}"))
    return table


def held_out_loss(metrics: dict[str, float]) -> str:
    """`3.212 → 2.310  (perplexity 10.1)`; empty without an evaluation."""
    before, after = metrics.get("evalLossBefore"), metrics.get("evalLoss")
    if before is None or after is None:
        return ""
    text = f"[bold]{before:.3f} → {after:.3f}[/]"
    if perplexity := metrics.get("perplexity"):
        text += f"  (perplexity {perplexity:.1f})"
    return text


def accuracy(metrics: dict[str, float]) -> str:
    """`0.912  (the most frequent class alone: 0.500)`."""
    text = f"{metrics['accuracy']:.3f}"
    share = metrics.get("majorityShare")
    if share is not None:
        text += f"  (the most frequent class alone: {share:.3f})"
    return text


def other_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of an evaluation by the tables of the tasks that have no line of their own, such as rewardAccuracy."""
    names = [metric.name for task in TRAINING_TASKS.values() for metric in task.metrics]
    return {name: metrics[name] for name in names if name in metrics and name not in WITH_OWN_LINE}


def training(metrics: dict[str, float]) -> str:
    """`400 steps, 5,210 tokens in 38 s`; empty without a training."""
    steps, tokens, seconds = (metrics.get(name) for name in ("steps", "tokens", "seconds"))
    if not steps or not seconds:
        return ""
    amount = f"{steps:,.0f} steps"
    if tokens:
        amount += f", {tokens:,.0f} tokens"
    return f"{amount} in {duration(seconds)}"


def outputs(metrics: dict[str, float]) -> str:
    """`120`, or `120; 3 failed: see ...`."""
    text = f"{metrics['rows']:,.0f}"
    failed = metrics.get("failedRows", 0)
    if failed:
        text += f"; [bold]{failed:,.0f} failed[/]: see the lines with an error in the result"
    return text


def samples(job: LocalJob) -> list[str]:
    """The first generated texts. Empty where the job generates none."""
    found = []
    for shard in sorted(job.folder.result.glob("shard-*.jsonl")):
        for line in shard.read_text().split("\n"):  # splitlines() would also split at U+2028, which a text may hold
            row = json.loads(line) if line else {}
            text = row.get("text")
            if text:
                found.append((row.get("row", 0), sample(str(row.get("prompt", "")), text)))
    return [shown for _, shown in sorted(found)[:SAMPLES]]


def sample(prompt: str, text: str) -> str:
    """A prompt and its text, indented."""
    if len(text) > SAMPLE_CHARACTERS:
        text = text[:SAMPLE_CHARACTERS] + " ..."
    prompt, text = (escape(part.replace("\n", "\n    ")) for part in (prompt, text))
    return f"\n    [cyan]{prompt}[/][dim]▸[/]{text}"


def intent(job: LocalJob) -> dict[str, Any]:
    """What a run would do, from the manifest alone."""
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


def plain(value: Any) -> str:
    """`value` as a manifest has it, without brackets around a list."""
    return " ".join(value) if isinstance(value, list) else json.dumps(value)


def duration(seconds: float) -> str:
    """`38 s`, `4 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def gigabytes(size: int) -> str:
    """`61.2 GB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 4))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _short(path: str | Path) -> str:
    """Relative to the current folder, if it is below that."""
    text = str(path)
    here = f"{Path.cwd()}/"
    return text.removeprefix(here)
