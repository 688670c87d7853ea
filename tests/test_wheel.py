"""The wheel holds every room, the layouts, the C sources and the demo model; installed elsewhere, it works there."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.wheels import ROOT, build_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what the repository tracks (and would track)."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def tracked(*patterns: str) -> list[str]:
    """Files of the rooms that must be in the wheel, as the wheel names them."""
    found = []
    for pattern in patterns:
        for path in ROOT.glob(pattern):
            name = str(path.relative_to(ROOT))
            found.append(name if name.startswith("shoal/") else f"shoal/{name}")
    return found


def test_wheel_holds_rooms_layouts_sources_and_demo(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = ("configs", "kernels", "parallel", "model", "engine", "server", "launcher")
    wanted = tracked("shoal/*.py", "configs/layouts/*.yaml", "kernels/native/*.[ch]", "shoal/demo/*.json")
    wanted += [name for room in rooms for name in tracked(f"{room}/*.py", f"{room}/*/*.py")]
    assert "shoal/demo/model.safetensors" in names
    assert sorted(set(wanted) - names) == []
    assert not any(name.startswith(("tests/", "scripts/", "kernels/", "docs/")) for name in names)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_works_in_an_empty_environment_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    constraints = ["-c", str(ROOT / "constraints.txt")]
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *constraints, str(wheel)]
    subprocess.run(install, check=True, timeout=900, cwd=tmp_path)
    shoal = str(tmp_path / "env" / "bin" / "shoal")
    args = ["generate", "demo", "--config", "tp2_pp2", "-p", "def main():", "--max-tokens", "8", "--temperature", "0"]
    done = subprocess.run([shoal, *args], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    script = (
        "from shoal import LLM, SamplingParams\n"
        "with LLM('demo', tensor_parallel_size=2) as llm:\n"
        "    outputs = llm.generate('import os', SamplingParams(temperature=0, max_tokens=5))\n"
        "    print(len(outputs[0].outputs[0].token_ids))\n"
    )
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "5"
