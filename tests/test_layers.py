"""The import rules of the repository, read from the sources and checked in fresh interpreters."""

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.configs.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("shoal", "launcher", "server", "engine", "model", "parallel", "kernels", "configs")
"""From the top down; a room imports from itself and from those after it."""
ROOMS = LAYERS[1:]
ONE_FILE_ONLY = ("ray", "deepspeed", "fastapi", "transformers", "huggingface_hub")
ENGINE_WITH_TORCH = {
    "batch_state",
    "begun",
    "choosing",
    "decode_batch",
    "inprocess_executor",
    "padded_batch",
    "profile",
    "sampler",
    "sequence_state",
    "shard_logprobs",
    "worker",
}
"""The side of the engine room that runs on the ranks; the rest, the engine's own loop, needs no torch."""
HEAVY = ("torch", "numpy", "transformers", "rich", "tokenizers", "jinja2", "huggingface_hub")


def sources(folder: str) -> list[Path]:
    """The Python files of a room; of `shoal` its own ones, not the linked rooms."""
    if folder == "shoal":
        return sorted([*(ROOT / "shoal").glob("*.py"), *(ROOT / "shoal" / "demo").rglob("*.py")])
    return sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of every import in a file, also inside functions; a relative one begins with a dot."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def layer_of(name: str) -> str | None:
    """The layer a dotted name belongs to; None outside the project. `shoal.LLM` and the like belong to shoal."""
    parts = name.split(".")
    if parts[0] != "shoal":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "shoal"


def run_python(code: str, cwd: Path = ROOT) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def module_names(folder: str) -> list[str]:
    """Dotted names of a room's modules."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sources(folder)]
    dotted = [".".join(part for part in path.parts if part != "__init__") for path in paths]
    return [name if name.startswith("shoal") else f"shoal.{name}" for name in dotted]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down_the_layers(layer: str) -> None:
    wrong = []
    for path in sources(layer):
        for line, name in imports(path):
            other = layer_of(name)
            if other is not None and LAYERS.index(other) < LAYERS.index(layer):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_rooms_are_imported_as_parts_of_shoal_only() -> None:
    paths = [path for folder in (*LAYERS, "tests", "scripts") for path in sources(folder)]
    wrong = []
    for path in paths:
        for line, name in imports(path):
            if name.split(".")[0] in ROOMS or (name.startswith(".") and "tests" not in path.parts):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ONE_FILE_ONLY)
def test_optional_packages_are_imported_in_one_file(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for layer in LAYERS
        for path in sources(layer)
        for _, name in imports(path)
        if name.split(".")[0] == package
    }
    assert len(users) <= 1, f"{package} is imported in {sorted(users)}"


def test_rich_is_imported_by_the_command_line_only() -> None:
    for layer in set(LAYERS) - {"launcher"}:
        for path in sources(layer):
            for line, name in imports(path):
                assert name.split(".")[0] != "rich", f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_links_lead_to_the_rooms() -> None:
    for room in ROOMS:
        link = ROOT / "shoal" / room
        assert link.is_symlink() and link.resolve() == ROOT / room


def test_room_called_kernels_can_be_imported_from_the_root() -> None:
    """transformers probes for a package of that name when it runs from the repository's root."""
    assert run_python("import kernels; print(len([n for n in vars(kernels) if not n.startswith('__')]))") == "0"


def test_engine_loop_front_end_and_configuration_need_no_torch() -> None:
    names = [name for room in ("configs", "engine", "server") for name in module_names(room)]
    names = [name for name in names if name.removeprefix("shoal.engine.") not in ENGINE_WITH_TORCH]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        print(name, "imports torch")
        break
"""
    assert run_python(code) == ""


def test_import_of_shoal_and_help_are_light() -> None:
    code = f"""
import sys
import shoal
import shoal.__main__ as program
for arguments in (["--help"], ["generate", "--help"], ["bench", "--help"]):
    program.main(arguments)
print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "loaded: []"


def test_package_resolves_to_the_rooms_from_the_root_and_when_installed(tmp_path: Path) -> None:
    code = "import shoal.parallel.control as m, os; print(os.path.realpath(m.__file__))"
    assert run_python(code) == str(ROOT / "parallel" / "control.py")
    if run_python("import importlib.util as u; print(u.find_spec('shoal') is not None)", cwd=tmp_path) == "True":
        assert run_python(code, cwd=tmp_path) == str(ROOT / "parallel" / "control.py")


def test_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION


def test_importing_shoal_shortens_active_waits_unless_somebody_chose_them() -> None:
    show = "import os, shoal; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run_python(f"import os; os.environ.pop('GOMP_SPINCOUNT', None); {show}") == "10000"
    assert run_python(f"import os; os.environ['GOMP_SPINCOUNT'] = '77'; {show}") == "77"
    hides = "import os; os.environ.pop('GOMP_SPINCOUNT', None); os.environ['OMP_WAIT_POLICY'] = 'active'"
    assert run_python(f"{hides}; {show}") == "None"
