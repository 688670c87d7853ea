"""Begun: a plan that a rank has taken, and whose result has not been."""

from dataclasses import dataclass, field

from shoal.engine.messages import StepPlan, StepResult
from shoal.engine.sequence_state import SequenceState
from shoal.model.graph_steps import BegunStep


@dataclass(slots=True)
class Begun:
    """previous: the plan before, while it is not done. step: what the device has of this one, since the moment
    `started`; None where nothing was handed over yet. followers: sequences, with the place among their tokens where the
    token of a row of this plan belongs. done: whether `result` is there.
    """

    plan: StepPlan
    previous: "Begun | None" = None
    step: BegunStep | None = None
    started: float = 0.0
    followers: list[tuple[SequenceState, int, int]] = field(default_factory=list)
    result: StepResult | None = None
    done: bool = False
