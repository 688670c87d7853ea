"""The digest tells checkpoints apart that differ where it looks: config, sizes, headers, samples of the data."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.configs.model_path import resolve_model_path
from shoal.model.checkpoint_digest import checkpoint_digest


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(resolve_model_path("demo") / name, tmp_path)
    return tmp_path


def test_copies_have_the_same_digest(copy: Path) -> None:
    assert checkpoint_digest(copy) == checkpoint_digest(resolve_model_path("demo"))


def truncated(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-4])


def retrained(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    weights.write_bytes(data)


@pytest.mark.parametrize("change", [truncated, retrained])
def test_changed_weights_have_another_digest_unless_they_are_left_out(
    copy: Path, change: Callable[[Path], None]
) -> None:
    whole, config = checkpoint_digest(copy), checkpoint_digest(copy, weights=False)
    change(copy / "model.safetensors")
    assert checkpoint_digest(copy) != whole
    assert checkpoint_digest(copy, weights=False) == config
