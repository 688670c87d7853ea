"""The table of checks of the Triton kernels: what scripts/gpu_check.py and the tests run.

Every kernel has a module `<operation>_checks.py` here with a function `cases(scale)` that yields Cases; TABLES names
them. A case makes fresh random inputs on a device and says how to run the kernel, plain torch in the same dtype, and
the float32 reference. The kernel's error may be twice plain torch's, each against the reference, and no output may be
left unwritten: runs are given NaN where they will write.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from shoal.kernels.gpu.compile import Compiled, compiling_for
from shoal.kernels.gpu.poison import poisoned_empty

Scale = Literal["tiny", "full"]
"""tiny: a few small shapes that Triton's interpreter does in seconds; full: the grid for a GPU."""

Outputs = tuple[torch.Tensor, ...]
TABLES = tuple(
    f"shoal.kernels.gpu.{operations}_checks" for operations in ("attention", "elementwise", "linear", "sampling")
)
KIB = 1024
SHARED_LIMITS = {80: 99 * KIB, 90: 227 * KIB}
"""What one program may have: 99 KiB on the consumer cards of the sm_80 class (8.6, 8.9), 227 KiB on 9.0."""
FLOAT32_ROUNDINGS = 16


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a case may compile to. registers: per thread; spill_bytes: per thread; shared: bytes by capability."""

    registers: int = 255
    spill_bytes: int = 0
    shared: dict[int, int] = field(default_factory=lambda: dict(SHARED_LIMITS))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One case with its inputs. run: the kernel, which may overwrite its inputs; reference: float32; plain: torch in
    the same dtype, None where the kernel must equal the reference exactly. bytes_moved, flops: what cannot be avoided.
    """

    run: Callable[[], Outputs]
    reference: Callable[[], Outputs]
    plain: Callable[[], Outputs] | None
    bytes_moved: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """kernel: the operation; name: the shape, unique within it; dtype: of the inputs. budget: it is compiled and
    held to it in reports; None: it is not. make: the inputs on a device (also "meta"), seeded by
    the caller. measured: worth timing.
    """

    kernel: str
    name: str
    dtype: torch.dtype
    make: Callable[[torch.device], Trial]
    budget: Budget | None = None
    measured: bool = False

    def make_sizes(self) -> Trial:
        """The trial without numbers: to compile it, or to ask what it moves."""
        return self.make(torch.device("meta"))


class Verdict(NamedTuple):
    """error, plain_error: greatest absolute differences from the reference; limit: the greatest allowed."""

    error: float
    plain_error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the kernel is right (an unwritten output gives NaN, which is not)."""
        return self.error <= self.limit


def all_cases(scale: Scale, tables: Sequence[str] = TABLES) -> Iterator[Case]:
    """Every case of every kernel."""
    for table in tables:
        yield from importlib.import_module(table).cases(scale)


def judge(trial: Trial) -> Verdict:
    """Run a trial, with whatever torch.empty gives poisoned. The limit is twice plain torch's error, and never less
    than a rounding of the largest value; or FLOAT32_ROUNDINGS of them in float32, where plain torch is the reference
    itself and sums in one of many orders.
    """
    reference, plain = trial.reference(), None if trial.plain is None else trial.plain()
    with poisoned_empty():
        ours = trial.run()
    error = greatest_difference(ours, reference)
    if plain is None:
        return Verdict(error, 0.0, 0.0)
    plain_error = greatest_difference(plain, reference)
    types = [rounding(out.dtype) for out in ours]
    sizes = [float(out.abs().max()) if out.numel() and out.is_floating_point() else 0.0 for out in reference]
    floor = max((eps * size for eps, size in zip(types, sizes, strict=True)), default=0.0)
    return Verdict(error, plain_error, max(2 * plain_error, floor))


def rounding(dtype: torch.dtype) -> float:
    """What a value of one may be off by, however well it was computed."""
    if not dtype.is_floating_point:
        return 0.0
    return torch.finfo(dtype).eps * (FLOAT32_ROUNDINGS if dtype == torch.float32 else 1)


def greatest_difference(ours: Outputs, reference: Outputs) -> float:
    """The greatest absolute difference over all outputs; NaN when one has NaN the other has not, inf for shapes."""
    worst = 0.0
    for one, other in zip(ours, reference, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            difference = (one.double() - other.double()).abs().max().item()
            worst = difference if difference != difference else max(worst, difference)
        if worst != worst:
            break
    return worst


def compile_case(case: Case, capability: int) -> list[Compiled]:
    """What the launches of a case compile to. Nothing runs: its inputs are sizes without numbers."""
    trial = case.make_sizes()
    with compiling_for(capability) as compiled:
        trial.run()
    return list(dict.fromkeys(compiled))


def over_budget(case: Case, compiled: Compiled) -> str | None:
    """What a compiled kernel exceeds, for people; None when it is within its budget."""
    budget = case.budget
    assert budget is not None, "only cases with a budget are compiled"
    limits = (
        ("registers", compiled.registers, budget.registers),
        ("spill_bytes", compiled.spill_bytes, budget.spill_bytes),
        ("shared_bytes", compiled.shared_bytes, budget.shared.get(compiled.capability, SHARED_LIMITS[90])),
    )
    over = [f"{name} {value} > {limit}" for name, value, limit in limits if value > limit]
    return f"{case.kernel} {case.name} sm_{compiled.capability}: {', '.join(over)}" if over else None
