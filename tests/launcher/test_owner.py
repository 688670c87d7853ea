"""However the user's process ends, every rank has ended within three seconds."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.launcher.harness import TAG, processes_tagged, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("user_script.py")
LIMIT_S, SLACK_S = 3.0, 3.0


def start(how: str, folder: Path, tensor: int = 2, data: int = 1) -> tuple[subprocess.Popen[str], str]:
    """Run the script until it serves; returns it and its tag."""
    tag = uuid.uuid4().hex
    script = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(ROOT), how, str(tensor), str(data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, TAG: tag, "TMPDIR": str(folder)},
    )
    assert script.stdout is not None and script.stderr is not None
    line = script.stdout.readline()
    assert line == "serving\n", script.stderr.read()
    return script, tag


def leave_nothing(tag: str, folder: Path) -> None:
    """Everything the script started is gone in time, and so is every file."""
    wait_until(lambda: processes_tagged(tag) == [], f"{processes_tagged(tag)} to end", LIMIT_S + SLACK_S)
    assert list(folder.iterdir()) == []
    assert not [name for name in os.listdir("/dev/shm") if "shoal" in name]


@pytest.mark.parametrize(
    ("how", "number", "status"),
    [
        ("waits", signal.SIGKILL, -signal.SIGKILL),
        ("waits", signal.SIGINT, -signal.SIGINT),
        pytest.param("forgets", signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("raises", None, 1, marks=pytest.mark.slow),
    ],
    ids=["killed", "interrupted", "terminated", "exception"],
)
def test_nothing_outlives_the_users_process(tmp_path: Path, how: str, number: int | None, status: int) -> None:
    script, tag = start(how, tmp_path)
    started = time.monotonic()
    if number is not None:
        assert [name for name, _ in processes_tagged(tag) if name.startswith("shoal")] == [
            "shoal-engine-0",
            "shoal-rank-0",
            "shoal-rank-1",
            "shoal-zygote",
        ]
        script.send_signal(number)
    _, errors = script.communicate(timeout=20)
    assert script.returncode == status, errors
    leave_nothing(tag, tmp_path)
    assert time.monotonic() - started < LIMIT_S + SLACK_S
    if how == "raises":
        assert "the user's mistake" in errors


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exits", "raises"])
def test_two_replicas_end_with_the_users_process(tmp_path: Path, how: str) -> None:
    script, tag = start(how, tmp_path, 2, 2)
    script.communicate(timeout=20)
    leave_nothing(tag, tmp_path)
