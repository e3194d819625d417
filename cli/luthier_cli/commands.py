"""The verbs of `luthier`. Each imports what it needs when it is called, so that `--help` and `version` answer at once.

Output for people goes to stdout. With `-o json` it goes to stderr, and stdout holds one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from luthier_api.exitcodes import ExitCode

if TYPE_CHECKING:
    from luthier_cli.estimates import Wanted
    from luthier_cli.local import LocalJob
    from luthier_cli.runner import Outcome
    from luthier_operator.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune models and generate with them: the same manifest on a laptop and on Kubernetes.",
)


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="Manifests, run in this order. A job may use the result of an earlier one. '-' is standard input.",
    ),
]
Root = Annotated[
    Path,
    typer.Option("--workspace", "-w", metavar="DIR", help="Each job works in DIR/<name> and leaves its result there."),
]
Mounts = Annotated[
    list[str] | None,
    typer.Option("--mount", metavar="PATH=FOLDER", help="Use FOLDER for the volume that the manifest mounts at PATH."),
]
As = Annotated[Output, typer.Option("--output", "-o", help="json: one document on stdout, everything else on stderr.")]
OnCpu = Annotated[bool, typer.Option("--cpu", help="Run without GPUs, whatever the manifest requests.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: delete the files of earlier runs of these jobs.")]
DEFAULT_ROOT = Path("luthier-runs")
PROFILES = ("LUTHIER_GPU_CLASSES", "LUTHIER_NAMESPACE_POLICIES")
"""Variables with which `plan --quick` judges a job as the operator would that has them."""


@app.command()
def run(
    files: Files,
    workspace: Root = DEFAULT_ROOT,
    mount: Mounts = None,
    output: As = Output.TEXT,
    cpu: OnCpu = False,
    fresh: Fresh = False,
) -> None:
    """Run jobs on this machine: prepare, train or generate, publish. Ctrl-C saves a checkpoint; the same command
    resumes from it.
    """
    _run(files, workspace, mount or [], output, cpu, fresh, plan_only=False)


@app.command()
def plan(
    files: Files,
    workspace: Root = DEFAULT_ROOT,
    mount: Mounts = None,
    output: As = Output.TEXT,
    cpu: OnCpu = False,
    fresh: Fresh = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Check the manifest, show what would run, and estimate memory and time from the model's configuration."
            " Nothing is downloaded or written.",
        ),
    ] = False,
    gpu_class: Annotated[
        str, typer.Option(metavar="NAME,...", help="Compare classes of GPUs, such as a100-80g,l40s; as --quick.")
    ] = "",
    gpu_classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Values of the chart, whose gpuClasses are known, too.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="config.json of the model, where it is not on this machine.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows to learn from, for the estimated time.")] = None,
) -> None:
    """Prepare a job and show what was found and how it would run. `luthier run` continues from there."""
    if quick or gpu_class:
        from luthier_cli.estimates import Wanted

        names = [name.strip() for name in gpu_class.split(",") if name.strip()]
        wanted = Wanted(classes=names, values=gpu_classes, config=model_config, rows=rows)
        _intend(files, workspace, mount or [], output, cpu, wanted)
    else:
        _run(files, workspace, mount or [], output, cpu, fresh, plan_only=True)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Manifest of a FineTuneJob. '-' is standard input.")],
    workspace: Root = DEFAULT_ROOT,
    mount: Mounts = None,
    output: As = Output.TEXT,
) -> None:
    """Show the dataset of a FineTuneJob as it would be learnt: splits, columns, lengths, the recommended maxLength, and
    one row with its labels. Nothing is trained, and no weights are read.
    """
    from luthier_cli.inspection import inspect_dataset, lines
    from luthier_cli.manifests import Refused

    try:
        jobs = _lay_out([file], workspace, mount or [], cpu=True)
        found = inspect_dataset(jobs)
    except Refused as refused:
        _refuse(refused.problems, refused.code, output)
    if output is Output.JSON:
        _print({"code": 0, "dataset": found})
        return
    for line in lines(found):
        typer.echo(line)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="train|generate|gpu [--file FILE] [OPTIONS]",
)
def bench(
    context: typer.Context,
    which: Annotated[str, typer.Argument(metavar="train|generate|gpu")] = "train",
    file: Annotated[str | None, typer.Option("--file", "-f", metavar="FILE")] = None,
    mount: Mounts = None,
) -> None:
    """Measure the speed and the memory of a training beside its plan and beside other programs, or the speed of a
    generation beside the limit of the device. `luthier bench train --help` has the options; --file measures the
    FineTuneJob, or the GenerateJob, of a manifest.
    """
    from luthier_cli.benchmark import bench as measure
    from luthier_cli.manifests import Refused

    try:
        jobs = _lay_out([file], DEFAULT_ROOT, mount or [], cpu=False) if file else []
        sys.exit(measure(which, context.args, jobs))
    except Refused as refused:
        _refuse(refused.problems, refused.code, Output.TEXT)


@app.command()
def render(files: Files) -> None:
    """Print the Kubernetes objects that the operator would create, as YAML. Settings are read from the environment, as
    by the operator.
    """
    import yaml

    from luthier_cli.manifests import Refused, read_manifests

    try:
        jobs = [manifest.job for manifest in read_manifests(files)]
    except Refused as refused:
        _refuse(refused.problems, refused.code, Output.TEXT)
    settings = _settings()
    with _extra("operator"):
        from luthier_operator.objects import objects
        from luthier_operator.policy import NotAllowed

    class Readable(yaml.SafeDumper):
        """Writes texts of several lines, such as run.json, as blocks."""

    Readable.add_representer(
        str,
        lambda dumper, text: dumper.represent_scalar(
            "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
        ),
    )
    for job in jobs:
        try:
            drawn = objects(job, settings, jobs)
        except NotAllowed as refused:
            _refuse([f"{job.metadata.name}: {refused}"], ExitCode.INVALID_SPEC, Output.TEXT)
        typer.echo(
            yaml.dump_all(drawn, Dumper=Readable, sort_keys=False, explicit_start=True, width=120, allow_unicode=True),
            nl=False,
        )


@app.command()
def operator() -> None:
    """Run the operator against the cluster of KUBECONFIG, or the one that this process runs in. Settings are read from
    the environment.
    """
    from luthier_operator.settings import NO_IMAGE

    settings = _settings()
    if settings.trainer_image == NO_IMAGE:
        problem = (
            "LUTHIER_TRAINER_IMAGE: required, the image of every pod of a job: the Dockerfile's target trainer, in a"
            " registry that the nodes can reach"
        )
        _refuse([problem], ExitCode.MISCONFIGURED, Output.TEXT)
    with _extra("operator"):
        from luthier_operator.app import run as serve
    serve(settings)


@app.command()
def crds() -> None:
    """Print the CustomResourceDefinitions as YAML, for `kubectl apply -f -`."""
    from luthier_api.crd import render as definitions

    for text in definitions().values():
        typer.echo(f"---\n{text}", nl=False)


@app.command()
def version() -> None:
    """Print the version, as `--version` does."""
    from importlib.metadata import version as installed

    typer.echo(installed("luthier"))


def _version(wanted: bool) -> None:
    """Raises typer.Exit after the version was printed."""
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Around imports that need an extra. Where it is not installed, the program says how to install it, and exits."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("luthier_cli", "luthier_operator", "luthier_api"):
            raise
        _refuse(
            [f"{error.name} is not installed: pip install '.[{name}]' in Luthier's sources"],
            ExitCode.MISCONFIGURED,
            Output.TEXT,
        )


def _settings() -> Settings:
    """Settings of the operator, from the environment. The program ends with a message about each wrong variable."""
    from pydantic import ValidationError

    from luthier_operator.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        # Without the value: the URL of a proxy may hold a password
        _refuse([_problem(e["loc"], e["msg"]) for e in error.errors()], ExitCode.MISCONFIGURED, Output.TEXT)


def _problem(location: tuple[int | str, ...], text: str) -> str:
    """Return what is wrong with a setting. `location`, `text`: as pydantic says it, which names a wrong key twice."""
    variable, *path = (str(part) for part in location if part != "[key]")
    text = text.removeprefix("Value error, ")
    return ": ".join(filter(None, (variable, ".".join(path), text.removeprefix(f"{path[-1]}: " if path else ""))))


def _lay_out(files: list[str], workspace: Path, mount: list[str], cpu: bool) -> list[LocalJob]:
    """The jobs of `files` on this machine. Raises Refused."""
    from luthier_cli.local import LocalJob, Place, on_cpu
    from luthier_cli.manifests import Refused, read_manifests

    mounts: dict[str, Path] = {}
    problems = []
    for pair in mount:
        path, separator, folder = pair.partition("=")
        if path.startswith("/") and separator:
            mounts[path] = Path(folder).resolve()
        else:
            problems.append(f"--mount {pair}: write it as /path/in/the/pods=folder/here")
    if problems:
        raise Refused(problems)
    place = Place(workspace.resolve(), mounts)
    manifests = read_manifests(files)
    return [LocalJob(on_cpu(m) if cpu else m, place) for m in manifests]


def _run(
    files: list[str], workspace: Path, mount: list[str], output: Output, cpu: bool, fresh: bool, *, plan_only: bool
) -> None:
    """Raises typer.Exit with the exit code of the first job that failed."""
    from rich.console import Console

    from luthier_cli.local import check_place
    from luthier_cli.manifests import Refused
    from luthier_cli.runner import Outcome, Stop, run_job
    from luthier_cli.screen import Screen

    console = Console(stderr=output is Output.JSON)
    outcomes: list[Outcome] = []
    try:
        jobs = _lay_out(files, workspace, mount, cpu)
        check_place(jobs, dict(os.environ), plan_only=plan_only)
        with Stop().listening() as stop:
            for job in jobs:
                screen = Screen(console, job)
                outcome = run_job(job, screen, stop, plan_only=plan_only, fresh=fresh)
                screen.summary(outcome)
                outcomes.append(outcome)
                if not outcome.finished:
                    break
    except Refused as refused:
        _refuse(refused.problems, refused.code, output, outcomes)
    outcomes += [Outcome(job, state="NotRun") for job in jobs[len(outcomes) :]]
    if output is Output.JSON:
        _print({"code": _code(outcomes), "jobs": [o.document() for o in outcomes]})
    raise typer.Exit(_code(outcomes))


def _intend(files: list[str], workspace: Path, mount: list[str], output: Output, cpu: bool, wanted: Wanted) -> None:
    from luthier_cli.estimates import estimate, shown
    from luthier_cli.manifests import Refused
    from luthier_cli.screen import intent

    try:
        jobs = [_on_the_cluster(job) for job in _lay_out(files, workspace, mount, cpu)]
        intents = [intent(job) | {"spec": job.manifest.job.spec.dump()} for job in jobs]
        estimates = [estimate(job, wanted) for job in jobs]
    except Refused as refused:
        _refuse(refused.problems, refused.code, output)
    if output is Output.JSON:
        _print({"code": 0, "jobs": [job | found for job, found in zip(intents, estimates, strict=True)]})
        return
    from rich.console import Console

    console = Console(soft_wrap=True)
    for intended, found in zip(intents, estimates, strict=True):
        for part in shown(intended, found):
            console.print(part, markup=False, highlight=False)


def _on_the_cluster(job: LocalJob) -> LocalJob:
    """The job with the administrator's defaults, where the environment has profiles as the operator's would.

    Raises Refused if they refuse it.
    """
    if not any(os.environ.get(variable) for variable in PROFILES):
        return job
    from luthier_cli.manifests import Refused
    from luthier_operator.policy import NotAllowed, check, with_defaults

    settings = _settings()
    filled = replace(job.manifest, job=with_defaults(job.manifest.job, settings))
    try:
        check(filled.workload, settings)
    except NotAllowed as refused:
        raise Refused([f"{filled.file}: {filled.name}: {refused}"]) from None
    return replace(job, manifest=filled)


def _code(outcomes: list[Outcome]) -> int:
    return next((o.code for o in outcomes if o.code), 0)


def _refuse(problems: list[str], code: ExitCode, output: Output, outcomes: list[Outcome] | None = None) -> NoReturn:
    """Print why no (further) job was started, and exit."""
    for problem in problems:
        typer.echo(problem, err=True)
    if output is Output.JSON:
        _print({"code": int(code), "problems": problems, "jobs": [o.document() for o in outcomes or []]})
    sys.exit(int(code))


def _print(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2))
