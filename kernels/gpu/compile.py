"""What a kernel compiles to, found without a GPU: registers, spills and shared memory of sm_80, sm_90 and others.

    with compiling_for(90) as compiled:
        launch_attention(...)  # on CPU or meta tensors: compiles what the launch would run, and runs nothing
    compiled[0].registers

The launch code chooses options and specialisation itself, so what is reported is what a GPU gets. Needs triton's own
ptxas and cuobjdump (in its wheel), and kernels that are not interpreted (no TRITON_INTERPRET).
"""

import contextlib
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_CUOBJDUMP_TIMEOUT_S = 60.0
_ONE_AT_A_TIME = threading.Lock()


class Compiled(NamedTuple):
    """One kernel. capability: 80, 90, ...; registers: per thread; spill_bytes: of local memory per thread (spilled
    registers and arrays); shared_bytes: per program; warps: per program.
    """

    name: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    stages: int


class _Driver:
    """Stands in for the GPU driver: a device whose number is its capability, on which nothing can run."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """While it lasts every Triton launch of this process compiles for the capability instead of running.

    Yields the list the compiled kernels are added to, each once per launch. Raises ValueError under TRITON_INTERPRET.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it")
    found: list[Compiled] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(resources(kernel, capability))
        return kernel

    with _ONE_AT_A_TIME:
        triton.runtime.driver.set_active(_Driver(capability))
        JITFunction.run = compile_only
        try:
            yield found
        finally:
            JITFunction.run = run
            triton.runtime.driver._active = active


def call_after_compiling(tell: Callable[[], None]) -> None:
    """Call `tell` whenever this process has compiled a kernel, which takes seconds: a sign of life for who waits."""

    def hook(**_what: Any) -> bool:
        tell()
        return False

    triton.knobs.runtime.jit_post_compile_hook = hook


def resources(kernel: Any, capability: int) -> Compiled:
    """What a compiled kernel needs, as its binary says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_CUOBJDUMP_TIMEOUT_S).stdout
    found = _RESOURCES.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump did not tell the registers of {kernel.metadata.name}:\n{text}")
    registers, stack, _, local = (int(number) for number in found.groups())
    meta = kernel.metadata
    return Compiled(meta.name, capability, registers, max(stack, local), meta.shared, meta.num_warps, meta.num_stages)
