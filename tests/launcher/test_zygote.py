"""The zygote: what it forks, what it reports, and that nothing outlives its owner."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from shoal.launcher.processes import LaunchError, Zygote, ZygoteConnection, describe_exit
from shoal.launcher.zygote_messages import Exited

ROOT = Path(__file__).resolve().parents[2]
CHILDREN = "tests.launcher.children"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait for a condition, and fail by name when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def read_pid(path: Path) -> int:
    """The pid a child wrote to a file, waited for."""
    wait_until(lambda: path.exists() and path.read_text() != "", f"{path.name} to be written", 30)
    return int(path.read_text())


def ended(connection: ZygoteConnection, process_id: int) -> Exited:
    """How a child ended, waited for."""
    (exited,) = connection.wait([process_id], 20)
    assert exited.process_id == process_id
    return exited


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One zygote for the tests that leave it as it was."""
    zygote = Zygote(["torch", "shoal.launcher.processes"])
    zygote.loaded(60)
    yield zygote
    zygote.close()


def test_a_child_has_torch_one_thread_its_own_session_and_no_strange_descriptors(
    zygote: Zygote, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    exited = ended(zygote.connection, zygote.connection.fork("rank 3", f"{CHILDREN}:report", str(path).encode()))
    assert exited.status == 0, exited.log
    state = msgspec.json.decode(path.read_bytes())
    assert state["ppid"] == state["sid"] == zygote.pid != os.getsid(0)
    assert state["kernel_threads"] == state["threads"] == 1
    assert state["cuda"] is False
    assert state["name"] == "shoal-rank-3"
    assert state["sigint_ignored"]
    others = [name for name in state["descriptors"] if not name.startswith(("/dev/null", "pipe", "/proc"))]
    assert others == [], "the zygote's sockets are not the child's"
    assert state["descriptors"].count("pipe") == 2
    assert exited.pid == state["pid"]


def test_exit_codes_exceptions_and_signals_are_reported_with_the_log(zygote: Zygote) -> None:
    connection = zygote.connection
    assert ended(connection, connection.fork("a", f"{CHILDREN}:leave", b"7")).status == 7
    failed = ended(connection, connection.fork("b", f"{CHILDREN}:fail", b""))
    assert failed.status == 1
    assert "about to fail" in failed.log and "RuntimeError: the reason" in failed.log
    crashed = ended(connection, connection.fork("c", f"{CHILDREN}:crash", b""))
    assert describe_exit(crashed) == "killed by SIGSEGV"
    unknown = ended(connection, connection.fork("d", "tests.launcher.nothing:here", b""))
    assert unknown.status == 1 and "tests.launcher.nothing" in unknown.log


def test_the_log_keeps_its_end_only(zygote: Zygote) -> None:
    exited = ended(zygote.connection, zygote.connection.fork("talker", f"{CHILDREN}:talk", b""))
    assert exited.log.endswith("line 19999\n")
    assert len(exited.log) <= 32 << 10


def test_a_child_can_be_killed_by_its_process_id(zygote: Zygote) -> None:
    connection = zygote.connection
    process_id = connection.fork("waiter", f"{CHILDREN}:wait", b"")
    (exited,) = connection.end([process_id], 10)
    assert exited.status == -signal.SIGKILL
    assert describe_exit(exited) == "killed by SIGKILL (out of memory?)"
    connection.signal(process_id, signal.SIGKILL)
    assert connection.running == {}


def test_a_supervisor_that_is_killed_takes_its_children_along(zygote: Zygote, tmp_path: Path) -> None:
    path = tmp_path / "supervisor"
    connection = zygote.connection
    process_id = connection.fork("engine", f"{CHILDREN}:supervise", str(path).encode(), supervises=True)
    pid, grandchild = read_pid(path), read_pid(tmp_path / "supervisor.child")
    assert alive(grandchild)
    os.kill(pid, signal.SIGKILL)
    assert ended(connection, process_id).status == -signal.SIGKILL
    wait_until(lambda: not alive(grandchild), "the grandchild to die")


def test_closing_a_zygote_ends_its_children_and_a_fork_of_the_owner_cannot_close_it(tmp_path: Path) -> None:
    zygote = Zygote([])
    zygote.loaded(60)
    path = tmp_path / "waiter"
    zygote.connection.fork("waiter", f"{CHILDREN}:wait", str(path).encode())
    pid = read_pid(path)
    fork = os.fork()
    if fork == 0:
        zygote.close()
        os._exit(0)
    os.waitpid(fork, 0)
    assert zygote.connection.poll() == [] and alive(pid)
    zygote.close()
    zygote.close()
    assert not alive(pid) and not alive(zygote.pid)


def test_a_killed_zygote_takes_its_children_along(tmp_path: Path) -> None:
    zygote = Zygote([])
    zygote.loaded(60)
    path = tmp_path / "waiter"
    process_id = zygote.connection.fork("waiter", f"{CHILDREN}:wait", str(path).encode())
    pid = read_pid(path)
    os.kill(zygote.pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), "the child to die")
    assert zygote.connection.wait([process_id], 10) == []
    assert zygote.connection.running == {}
    with pytest.raises(LaunchError, match="cannot start another: the zygote"):
        zygote.connection.fork("another", f"{CHILDREN}:wait", b"")
        zygote.connection.fork("another", f"{CHILDREN}:wait", b"")
    zygote.close()


def test_a_module_that_cannot_be_imported_is_named() -> None:
    zygote = Zygote(["shoal.there_is_no_such_module"])
    with pytest.raises(LaunchError, match="there_is_no_such_module"):
        zygote.loaded(60)
    zygote.close()


@pytest.mark.parametrize("loaded", [True, False], ids=["while serving", "while importing"])
def test_nothing_outlives_an_owner_that_is_killed(tmp_path: Path, loaded: bool) -> None:
    """Even when a fork of the owner keeps its descriptors open. The script has no __main__ guard."""
    script = tmp_path / "user_script.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, sys, time
            sys.path.insert(0, {str(ROOT)!r})
            from shoal.launcher.processes import Zygote
            zygote = Zygote(["torch"])
            if {loaded}:
                zygote.loaded(60)
                zygote.connection.fork("waiter", "{CHILDREN}:wait", {str(tmp_path / "waiter")!r}.encode())
                while not os.path.exists({str(tmp_path / "waiter")!r}):
                    time.sleep(0.01)
            fork = os.fork()
            if fork == 0:
                time.sleep(60)
                os._exit(0)
            print(zygote.pid, fork, flush=True)
            time.sleep(60)
        """)
    )
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    if loaded:
        pids.append(read_pid(tmp_path / "waiter"))
    fork = pids.pop(1)
    assert all(alive(pid) for pid in [*pids, fork])
    owner.kill()
    owner.wait()
    try:
        wait_until(lambda: not any(alive(pid) for pid in pids), "everything to end", 3.0 + 2.0)
    finally:
        os.kill(fork, signal.SIGKILL)
    owner.stdout.close()
