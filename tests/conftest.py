"""Options and environment of all tests: --slow and --soak enable the tests of those marks; one thread per process."""

import os

import pytest

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before torch is imported anywhere, and inherited by every rank a test starts
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on CPU tensors
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests download nothing
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_OPTIONAL = {"slow": "full grids", "soak": "long drills"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option per optional mark."""
    for mark, meaning in _OPTIONAL.items():
        parser.addoption(f"--{mark}", action="store_true", help=f"also run the tests marked {mark} ({meaning})")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests whose mark was not asked for; they are counted as deselected."""
    unwanted = {mark for mark in _OPTIONAL if not config.getoption(f"--{mark}")}
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in unwanted)]
    if left_out:
        chosen = set(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in chosen]
