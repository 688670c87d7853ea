"""`shoal doctor` tries what this machine must be able to do, and says what to do where it cannot."""

import json
import os
import subprocess
import sys
from typing import Any


def doctor(**environment: str) -> "tuple[int, dict[str, dict[str, Any]]]":
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, **environment},
    )
    assert done.stdout, done.stderr
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_a_working_machine_passes_with_its_speed_measured() -> None:
    status, found = doctor()
    assert status == 0
    assert found["collectives shm, 2 ranks"]["status"] == "pass"
    assert found["collectives gloo, 2 ranks"]["status"] == "pass"
    assert float(found["cpu memory reads"]["value"].split()[0]) > 0


def test_without_a_compiler_it_warns_and_says_what_to_install(tmp_path: Any) -> None:
    status, found = doctor(PATH=str(tmp_path), CC="", XDG_CACHE_HOME=str(tmp_path))
    assert status == 0
    assert found["C kernels"]["status"] == "warn"
    assert "gcc" in found["C kernels"]["fix"]
    assert "collectives shm, 2 ranks" not in found
    assert found["collectives gloo, 2 ranks"]["status"] == "pass"
