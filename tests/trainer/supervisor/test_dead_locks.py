"""A killed process keeps nobody waiting for what it was compiling."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from luthier_trainer.supervisor.dead_locks import remove_dead_locks
from luthier_trainer.supervisor.preflight import check_operators

# torch's own lock, from its file: importing torch takes seconds
HOLDER = """
import runpy, sys, time
assert runpy.run_path(sys.argv[1])["FileBaton"](sys.argv[2]).try_acquire()
print("holds", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "py311_cpu/cpu_adam"
    folder.mkdir(parents=True)
    return folder / "lock"


def holder(lock: Path) -> subprocess.Popen[str]:
    torch = find_spec("torch")
    assert torch
    assert torch.origin
    baton = Path(torch.origin).parent / "utils/file_baton.py"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(baton), str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_lock_goes_with_the_process_that_held_it(
    lock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(lock) as process:
        remove_dead_locks(tmp_path)
        assert lock.exists()
        process.kill()
    remove_dead_locks(tmp_path)
    assert not lock.exists()
    assert f"{lock} was deleted" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def test_before_operators_are_compiled(
    variable: str, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    lock = lock if variable == "TORCH_EXTENSIONS_DIR" else tmp_path / "torch_extensions/py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    check_operators("zero2", "cpu", tmp_path / "deepspeed-without-operators")
    assert not lock.exists()
