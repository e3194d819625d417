"""PID 1 with real children: what it returns, says, kills and waits for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cases.quick import quick

from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord
from luthier_api.status import Plan, ResolvedDataset, ResolvedSource
from luthier_api.termination import TerminationMessage
from luthier_api.terminationlog import LIMIT_BYTES
from luthier_trainer.workspace.prepared import FINGERPRINT, fingerprint, read_prepared, write_prepared

TOKEN = "hf_" + "a1B2" * 9
PATIENCE = 90  # seconds, on a machine that has other things to do

# The supervisor itself, with a small script in the place of the phase's process.
DRIVER = """
import sys
from pathlib import Path
from luthier_trainer.supervisor import entrypoint, signals
from luthier_trainer.supervisor import main as supervisor
supervisor.command = lambda verb, run, node_rank: [sys.executable, sys.argv[3]]
raise SystemExit(entrypoint.phase(sys.argv[1], Path(sys.argv[2]), signals.Stop()))
"""
CHILD = """
import faulthandler, json, os, signal, subprocess, sys, time
from pathlib import Path
run = Path(os.environ["LUTHIER_RUN_DIR"])
def result(code, rank=0, **more):
    reason = {0: "Completed", 65: "InvalidDataset", 75: "Preempted", 81: "PeerLost", 71: "InfrastructureError"}[code]
    written = {"phase": "run", "code": code, "reason": reason, "rank": rank} | more
    (run / f"result-{rank}.json").write_text(json.dumps(written))
"""


def give_prepared(run: FineTuneRun | GenerateRun) -> None:
    """A workspace whose `prepare` has ended well."""
    folder = Path(run.workspace) / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINGERPRINT).write_text(fingerprint(run))
    write_prepared(
        run,
        PreparedRecord(
            model=ResolvedSource(source="m"),
            dataset=ResolvedDataset(source="d", rows=1),
            plan=Plan(strategy="none"),
            model_path="m",
            dataset_path="d",
        ),
    )


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, make_generate_run: Callable[..., GenerateRun]) -> Iterator[Start]:
    """Start the supervisor over a child script; ends it, and all below it, with the test."""
    started: list[subprocess.Popen[str]] = []

    def run_it(
        script: str,
        verb: str = "generate",
        given: FineTuneRun | None = None,
        grace_seconds: int = 60,
        step_timeout: int = 1800,
        prepared: bool = True,
        **environment: str,
    ) -> subprocess.Popen[str]:
        run = given or make_generate_run(grace_seconds=grace_seconds)
        run = run.model_copy(update={"step_timeout_seconds": step_timeout})
        if prepared:
            give_prepared(run)
        (tmp_path / "run.json").write_text(json.dumps(run.dump()))
        (tmp_path / "child.py").write_text(CHILD + textwrap.dedent(script))
        (tmp_path / "driver.py").write_text(DRIVER)
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    str(tmp_path / "driver.py"),
                    verb,
                    str(tmp_path / "run.json"),
                    str(tmp_path / "child.py"),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | environment,
            )
        )
        return started[-1]

    yield run_it
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def last_word(tmp_path: Path) -> TerminationMessage:
    message = TerminationMessage.read((tmp_path / "run" / "termination-log").read_text())
    assert message is not None
    return message


def wait_for(path: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


@dataclass(frozen=True)
class EndCase:
    name: str
    script: str
    code: int
    message: str
    environment: dict[str, str] = field(default_factory=dict)
    step_timeout: int = 1800


ENDS = [
    EndCase(
        name="a good end",
        script="result(0, metrics={'evalLoss': 1.5})",
        code=0,
        message="",
    ),
    EndCase(
        name="a good end, then a crash in teardown",
        script="result(0); os.abort()",
        code=0,
        message="",
    ),
    EndCase(
        name="a mistake of the user",
        script="result(65, message='spec.dataset: no'); os._exit(65)",
        code=65,
        message="spec.dataset: no",
    ),
    EndCase(
        name="a mistake on one rank, lost peers on the others",
        script="result(81, 0, message='gone'); result(65, 1, message='bad row'); sys.exit(1)",
        code=65,
        message="bad row",
    ),
    EndCase(
        name="an agreed stop on another pod",
        script="result(75, saved=True, step=7)",
        code=75,
        message="",
    ),
    EndCase(
        name="a lost peer",
        script="result(81, message='Connection reset by peer'); sys.exit(1)",
        code=81,
        message="Connection reset",
    ),
    EndCase(
        name="no message",
        script="print('deep trouble'); sys.exit(3)",
        code=70,
        message="the process ended with 3 and left no message",
    ),
    EndCase(
        name="no message, but a code of ours",
        script="sys.exit(74)",
        code=74,
        message="ended with 74",
    ),
    EndCase(
        name="an end without a result",
        script="pass",
        code=70,
        message="ended with 0 but left no result",
    ),
    EndCase(
        name="NCCL's watchdog aborts",
        script=(
            "print('[rank0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)')\nfor n in range(40):"
            " print('frame', n)\nsys.stdout.flush(); os.abort()"
        ),
        code=80,
        message="WorkNCCL(SeqNum=7). A process of the group did not come",
    ),
    EndCase(
        name="a crash of its own",
        script="os.kill(os.getpid(), signal.SIGSEGV)",
        code=71,
        message="the process crashed with SIGSEGV; see its last lines",
    ),
    EndCase(
        name="killed by somebody",
        script="os.kill(os.getpid(), signal.SIGKILL)",
        code=71,
        message="killed by SIGKILL, which Luthier did not send",
    ),
    EndCase(
        name="out of memory",
        script=(
            "Path(os.environ['LUTHIER_CGROUP'], 'memory.events').write_text('oom 1\\noom_kill 3\\n');"
            " os.kill(os.getpid(), 9)"
        ),
        environment={"LUTHIER_CGROUP": "CGROUP"},
        code=83,
        message="spec.resources.memory: the container ran out of memory",
    ),
    EndCase(
        name="a hang",
        script=(
            "from luthier_trainer.runtime.run_folder import announce, stacks_file\nannounce()\n"
            "file = stacks_file(run, 0).open('w'); faulthandler.register(signal.SIGUSR1, file=file)\n"
            "(run / 'heartbeat').write_text('7')\ndef stuck():\n    time.sleep(60)\nstuck()"
        ),
        step_timeout=1,
        code=80,
        message="after step 7: rank 0 is in stuck (child.py:",
    ),
]


@pytest.mark.parametrize(
    "case",
    quick(
        ENDS,
        "a good end",
        "a mistake on one rank, lost peers on the others",
        "a lost peer",
        "no message",
        "out of memory",
        "a hang",
    ),
)
def test_an_end_becomes_a_code(case: EndCase, start: Start, tmp_path: Path) -> None:
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup" / "memory.events").write_text("oom 0\noom_kill 2\n")
    process = start(
        case.script,
        step_timeout=case.step_timeout,
        **{k: str(tmp_path / "cgroup") if v == "CGROUP" else v for k, v in case.environment.items()},
    )
    output, _ = process.communicate(timeout=PATIENCE)
    said = last_word(tmp_path)
    assert (process.returncode, said.code) == (case.code, case.code), output
    assert case.message in said.message
    if case.name == "a hang":
        assert "in stuck" in output
    if case.name == "no message":
        assert "deep trouble" in output
        assert said.last_lines == "deep trouble"


def test_a_stop_is_agreed_on_not_forwarded(start: Start, tmp_path: Path) -> None:
    """The child would die of a SIGTERM; it sees the file, saves, and says so."""
    process = start("""
        (run / "ready").touch()
        while not (run / "stop").exists():
            time.sleep(0.02)
        result(75, saved=True, step=12)
        """)
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert (last_word(tmp_path).saved, last_word(tmp_path).step) == (True, 12)


def test_a_second_interrupt_waits_for_no_checkpoint(start: Start, tmp_path: Path) -> None:
    """Ctrl-C twice, on a laptop."""
    process = start("(run / 'ready').touch()\ntime.sleep(60)")
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "run" / "stop")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 75
    assert last_word(tmp_path).saved is False


@dataclass(frozen=True)
class AfterSigtermCase:
    name: str
    script: str
    message: str


AFTER_SIGTERM = [
    AfterSigtermCase(
        name="ignores the stop",
        script="time.sleep(60)",
        message="the grace period ended",
    ),
    AfterSigtermCase(
        name="fails of something else",
        script="while not (run / 'stop').exists(): time.sleep(0.02)\nresult(65, message='bad'); os._exit(65)",
        message="InvalidDataset: bad",
    ),
    AfterSigtermCase(
        name="has no message",
        script="while not (run / 'stop').exists(): time.sleep(0.02)\nsys.exit(1)",
        message="ended with 1",
    ),
]


@pytest.mark.parametrize("case", AFTER_SIGTERM, ids=lambda case: case.name)
def test_after_a_sigterm_nothing_is_final(case: AfterSigtermCase, start: Start, tmp_path: Path) -> None:
    process = start("(run / 'ready').touch()\n" + case.script, grace_seconds=2)
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert last_word(tmp_path).saved is False
    assert case.message in last_word(tmp_path).message


def test_workers_in_sessions_of_their_own_are_killed_too(start: Start, tmp_path: Path) -> None:
    process = start(
        """
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        (run / "pid").write_text(str(grandchild.pid))
        (run / "ready").touch()
        time.sleep(60)
        """,
        grace_seconds=2,
    )
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert not Path(f"/proc/{(tmp_path / 'run' / 'pid').read_text()}").exists()


def test_ranks_do_not_outlive_the_agent_that_started_them(start: Start, tmp_path: Path) -> None:
    """On a laptop they would keep their GPUs."""
    process = start("""
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        (run / "pid").write_text(str(grandchild.pid))
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    assert process.wait(timeout=PATIENCE) == 71
    assert not Path(f"/proc/{(tmp_path / 'run' / 'pid').read_text()}").exists()


def test_prepare_has_nothing_to_save_and_stops_at_once(start: Start, tmp_path: Path) -> None:
    process = start("(run / 'ready').touch(); time.sleep(600)", verb="prepare", grace_seconds=600)
    wait_for(tmp_path / "run" / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert last_word(tmp_path).message == "stopped; the next start continues from here"


def test_a_lost_peer_waits_to_be_stopped(start: Start, tmp_path: Path, make_run: Callable[..., FineTuneRun]) -> None:
    """The pod that caused it fails first; the cluster then stops us, which costs nothing."""
    process = start(
        "result(81, message='gone'); (run / 'ready').touch(); sys.exit(1)",
        verb="train",
        given=make_run(resources={"nodes": 2, "gpusPerNode": 0}),
        LUTHIER_PEER_LOST_LINGER="60",
    )
    wait_for(tmp_path / "run" / "ready")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75


# In the place of `accelerate launch`: ranks in sessions of their own. When one has ended, the others get SIGTERM. The
# ends of all are reported in the words of torch's agent.
AGENT = """
ranks = []
for rank in range(2):
    env = os.environ | {"RANK": str(rank), "SUPERVISOR": str(os.getppid())}
    ranks.append(subprocess.Popen([sys.executable, __file__, "rank"], env=env, start_new_session=True))
while all(process.poll() is None for process in ranks):
    time.sleep(0.1)
for process in ranks:
    process.terminate()
for rank, process in enumerate(ranks):
    process.wait()
    report = f"  rank      : {rank} (local_rank: {rank})\\n  exitcode  : {process.returncode} (pid: {process.pid})"
    print(report, flush=True)
sys.exit(1)
"""
# Rank 0 waits for a message of rank 1, as in a collective operation. The kernel closes a connection before it reports
# the end of the process, so rank 0 waits for that report: its own end must come second.
RANK = """
import socket
from luthier_trainer.runtime.run_folder import announce, stacks_file
rank = int(os.environ["RANK"])
announce()
faulthandler.register(signal.SIGUSR1, file=stacks_file(run, rank).open("w"))
address = str(run / "socket")
def all_reduce():
    try:
        closed = connection.recv(1) == b""
    except ConnectionResetError:
        closed = True
    if closed:
        peer = Path(f"/proc/{(run / 'peer').read_text()}/stat")
        try:
            while ") Z " not in peer.read_text(): time.sleep(0.01)
        except (FileNotFoundError, ProcessLookupError):
            pass
        result(81, rank, message="Connection closed by peer")
        os._exit(81)
if rank == 0:
    server = socket.socket(socket.AF_UNIX); server.bind(address); server.listen()
    connection, _ = server.accept()
    (run / "heartbeat").write_text("12")
    all_reduce()
else:
    (run / "peer").write_text(str(os.getpid()))
    while not os.path.exists(address): time.sleep(0.02)
    connection = socket.socket(socket.AF_UNIX); connection.connect(address)
    def is_watched():
        try:
            infos = [file.read_text() for file in Path(f"/proc/{os.environ['SUPERVISOR']}/fdinfo").iterdir()]
        except FileNotFoundError:  # one was closed
            return False
        return any(f"Pid:\\t{os.getpid()}\\n" in info for info in infos)
    while not is_watched(): time.sleep(0.02)
    os.kill(os.getpid(), NUMBER)
    time.sleep(60)
"""


@pytest.fixture
def start_group(start: Start, make_run: Callable[..., FineTuneRun]) -> Callable[..., subprocess.Popen[str]]:
    """Start the supervisor of one pod with two ranks. Rank 1 sends itself a signal."""

    def start_it(number: int, **more: Any) -> subprocess.Popen[str]:
        script = "if sys.argv[1:] == ['rank']:\n"
        script += textwrap.indent(RANK.replace("NUMBER", str(number)), "    ")
        script += "else:\n" + textwrap.indent(AGENT, "    ")
        return start(script, verb="train", given=make_run(resources={"gpusPerNode": 0, "processesPerNode": 2}), **more)

    return start_it


@dataclass(frozen=True)
class SignalCase:
    number: signal.Signals
    message: str


SIGNALS = [
    SignalCase(
        number=signal.SIGKILL,
        message="rank 1 was killed by SIGKILL, which Luthier did not send: by the kernel, or by somebody; see its"
        " last lines",
    ),
    SignalCase(
        number=signal.SIGTERM,
        message="rank 1 was killed by SIGTERM, which Luthier did not send: by the kernel, or by somebody; see its"
        " last lines",
    ),
    SignalCase(
        number=signal.SIGSEGV,
        message="rank 1 crashed with SIGSEGV; see its last lines",
    ),
    SignalCase(
        number=signal.SIGABRT,
        message="rank 1 crashed with SIGABRT; see its last lines",
    ),
    SignalCase(
        number=signal.SIGBUS,
        message="rank 1 crashed with SIGBUS; see its last lines",
    ),
]


@pytest.mark.parametrize("case", SIGNALS, ids=lambda case: case.number.name)
def test_a_rank_that_a_signal_ended_is_the_cause(
    case: SignalCase, start_group: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """And a pod alone waits for nobody."""
    process = start_group(case.number, LUTHIER_PEER_LOST_LINGER="60")
    output, _ = process.communicate(timeout=PATIENCE)
    said = last_word(tmp_path)
    assert (process.returncode, said.rank, said.message) == (71, 1, case.message), output


def test_a_rank_that_is_stopped_is_named(start_group: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start_group(signal.SIGSTOP, step_timeout=2)
    output, _ = process.communicate(timeout=PATIENCE)
    said = last_word(tmp_path)
    assert (process.returncode, said.reason, said.rank) == (80, "Hang", 1), output
    assert (
        "after step 12: rank 1 is stopped (by SIGSTOP or a frozen container), rank 0 is in all_reduce (child.py:"
        in (said.message)
    )
    assert "in all_reduce" in output


def test_stale_files_of_an_earlier_start_are_gone(start: Start, tmp_path: Path) -> None:
    for name in ("stop", "heartbeat", "result-0.json"):
        (tmp_path / "run" / name).write_text('{"phase":"run","code":65,"reason":"InvalidDataset"}')
    process = start("assert not (run / 'stop').exists() and not (run / 'heartbeat').exists(); result(0)")
    assert process.wait(timeout=PATIENCE) == 0


def test_tokens_reach_neither_lines_nor_message(start: Start, tmp_path: Path) -> None:
    process = start(f"print('curl -H {TOKEN}', flush=True); result(71, message='401 for {TOKEN}'); sys.exit(1)")
    process.communicate(timeout=PATIENCE)
    raw = (tmp_path / "run" / "termination-log").read_text()
    assert TOKEN not in raw
    assert "curl -H hf_…" in raw


def test_the_last_word_fits_where_the_kubelet_reads_it(start: Start, tmp_path: Path) -> None:
    process = start("for i in range(200): print(i, 'é' * 300)\nresult(71, message='x' * 9000); sys.exit(1)")
    process.communicate(timeout=PATIENCE)
    raw = (tmp_path / "run" / "termination-log").read_bytes()
    assert len(raw) <= LIMIT_BYTES
    assert TerminationMessage.read(raw.decode()) is not None


def test_run_pods_hold_the_credentials_of_trackers_and_no_token(start: Start, tmp_path: Path) -> None:
    process = start(
        "names = ('HF_TOKEN', 'MLFLOW_TRACKING_TOKEN', 'HF_HUB_OFFLINE')\n"
        "(run / 'seen').write_text(str([os.environ.get(name) for name in names])); result(0)",
        HF_TOKEN=TOKEN,
        MLFLOW_TRACKING_TOKEN="of the tracker",
    )
    assert process.wait(timeout=PATIENCE) == 0
    assert (tmp_path / "run" / "seen").read_text() == "[None, 'of the tracker', '1']"


def entry(tmp_path: Path, verb: str, document: object) -> subprocess.CompletedProcess[str]:
    """The image's own entry point."""
    (tmp_path / "run.json").write_text(json.dumps(document))
    return subprocess.run(
        [sys.executable, "-m", "luthier_trainer", verb, "--run", str(tmp_path / "run.json")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def good(run: FineTuneRun | GenerateRun, **changes: Any) -> dict[str, Any]:
    document: Any = run.dump()
    for path, value in changes.items():
        *way, last = path.split("__")
        place = document
        for step in way:
            place = place[step]
        place[last] = value
    return document


def test_the_supervisor_imports_nothing_heavy() -> None:
    code = (
        "import sys, luthier_trainer.supervisor.main; print([m for m in ('torch', 'transformers', 'datasets', 'numpy',"
        " 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == "[]"


def test_a_workspace_that_is_not_prepared(tmp_path: Path, make_run: Callable[..., FineTuneRun]) -> None:
    done = entry(tmp_path, "train", good(make_run()))
    assert done.returncode == 78
    assert "prepared.json: missing. Run `prepare` first, on the same workspace" in last_word(tmp_path).message


def test_a_workspace_of_another_job_is_not_trained_on(tmp_path: Path, make_run: Callable[..., FineTuneRun]) -> None:
    give_prepared(make_run())
    done = entry(tmp_path, "train", good(make_run(), spec__training__seed=7))
    assert done.returncode == 64
    assert (
        "was prepared for another version of job 'job': spec.training.seed is 7, there it was 42."
        in last_word(tmp_path).message
    )


CIRCUMSTANCES = [
    ("hub", {"repo": "org/out", "tokenSecretRef": {"name": "hf"}}),
    ("restarts", {"max": 9}),
    ("workspace", {"claimName": "another"}),
    ("suspend", True),
    ("scheduling", {"queueName": "team-a"}),
    ("volumes", [{"claimName": "models", "mountPath": "/models"}]),
    ("activeDeadlineSeconds", 60),
    ("training__saveSteps", 7),
    ("resources__memory", "8Gi"),
]


@pytest.mark.parametrize(("field", "value"), CIRCUMSTANCES, ids=[c[0] for c in CIRCUMSTANCES])
def test_what_decides_where_and_when_makes_no_other_job(
    field: str, value: object, make_run: Callable[..., FineTuneRun]
) -> None:
    give_prepared(make_run())
    assert read_prepared(FineTuneRun.model_validate(good(make_run(), **{f"spec__{field}": value}))).model_path == "m"


@dataclass(frozen=True)
class EndpointCase:
    name: str
    endpoint: str | None
    expect: str | None


ENDPOINTS = [
    EndpointCase(
        name="the Hub itself",
        endpoint=None,
        expect=None,
    ),
    EndpointCase(
        name="the Hub, spelt out",
        endpoint="https://huggingface.co/",
        expect=None,
    ),
    EndpointCase(
        name="a mirror: uploads by LFS, which all of them speak",
        endpoint="http://hub.example:8080",
        expect="1",
    ),
]


@pytest.mark.parametrize("case", ENDPOINTS, ids=lambda case: case.name)
def test_only_the_hub_itself_is_spoken_to_by_xet(
    case: EndpointCase, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    script = CHILD + "print('xet', os.environ.get('HF_HUB_DISABLE_XET')); result(0)"
    process = start(script, **({"HF_ENDPOINT": case.endpoint} if case.endpoint else {}))
    assert f"xet {case.expect}" in process.communicate(timeout=PATIENCE)[0]


LATE = """
import os, sys
from luthier_trainer import __main__
from luthier_trainer.supervisor import entrypoint
entrypoint.main = lambda arguments, stop: 75
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=int(sys.argv[1])):
        kill(pid, number)  # after Python has taken its handlers away
late = Late()
raise SystemExit(__main__.run())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_process_that_ends_changes_no_exit_code(number: int) -> None:
    assert subprocess.run([sys.executable, "-c", LATE, str(int(number))], check=False).returncode == 75
