"""A wheel of this checkout, built from a copy of what the repository tracks (and would track)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build_wheel(folder: Path, version: str | None = None) -> Path:
    """The wheel's file in folder. version: that it says it is, to be told from the checkout."""
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=30,
    ).stdout
    for name in listed.decode().split("\0"):
        origin, copy = ROOT / name, source / name
        if not name or not (origin.is_file() or origin.is_symlink()):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            copy.symlink_to(os.readlink(origin))
        else:
            copy.write_bytes(origin.read_bytes())
    if version is not None:
        _say_version(source, version)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    subprocess.run(command, cwd=source, check=True, timeout=120)
    return next(folder.glob("shoal-*.whl"))


def _say_version(source: Path, version: str) -> None:
    for name, pattern in (("pyproject.toml", 'version = "{}"'), ("configs/version.py", 'VERSION = "{}"')):
        path = source / name
        have = next(line for line in path.read_text().splitlines() if line.startswith(pattern.partition("{")[0]))
        path.write_text(path.read_text().replace(have, pattern.format(version), 1))
