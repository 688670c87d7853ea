"""C kernels compiled for other processors than this one, for tests of every path of theirs."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoal.kernels.build import SOURCES, NativeBuild, NativeLibrary, find_compiler

VARIANTS = {  # the pairs of AVX512-BF16 and the tiles of AMX are emulated where they are missing
    "avx2": ["-march=haswell"],
    "pairs": ["-march=native", "-DSHOAL_EMULATE_BF16_PAIRS", "-DSHOAL_NO_AMX"],
    "avx2_pairs": ["-march=haswell", "-DSHOAL_EMULATE_BF16_PAIRS"],
    "amx": ["-march=native", "-DSHOAL_EMULATE_AMX"],
    "avx2_amx": ["-march=haswell", "-DSHOAL_EMULATE_AMX"],
    "plain": [],
}


def compile_sources(flags: Sequence[str], names: Sequence[str], folder: Path) -> NativeLibrary:
    """Some files of kernels/native compiled with other flags."""
    path = folder / "variant.so"
    sources = [str(SOURCES / name) for name in names]
    base = ["-std=gnu11", "-O2", "-fPIC", "-fopenmp", *flags, "-shared", "-o", str(path), *sources, "-lm"]
    subprocess.run([*find_compiler(), *base], check=True, capture_output=True, timeout=120)
    return NativeLibrary(NativeBuild(path, "variant"))


def compile_variant(name: str, sources: Sequence[str], folder: Path) -> NativeLibrary:
    """A variant that this machine can run; the test is skipped where it cannot."""
    if name != "plain" and os.uname().machine != "x86_64":
        pytest.skip("a variant of x86-64")
    if "-march=haswell" in VARIANTS[name] and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    return compile_sources(VARIANTS[name], sources, folder)
