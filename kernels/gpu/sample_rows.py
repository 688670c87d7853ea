"""Rows of a step from their raw logits to token ids: edits, limits, sampling, from settings that lie on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shoal.kernels.gpu.logit_limits import launch_logit_limits
from shoal.kernels.gpu.sampling import Biases, Choices, Penalties, launch_sample


@dataclass(frozen=True, slots=True)
class RowPenalties:
    """prompt_seen: [num_tokens] bool; output_counts: [num_tokens] int32, on the logits' device; the rest as in
    penalties.py.
    """

    prompt_seen: torch.Tensor
    output_counts: torch.Tensor
    presence: float
    frequency: float
    repetition: float


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row is sampled: temperature 0 takes the best token; biases: (token id, what is added; -inf bans)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int
    sample_index: int
    biases: Sequence[tuple[int, float]] = ()
    penalties: RowPenalties | None = None

    @property
    def filters(self) -> bool:
        """Whether some tokens are dropped."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class DeviceRows(NamedTuple):
    """Settings of rows where the logits are; filters: top_k, top_p, min_p, None when no row filters."""

    biases: Biases | None
    penalties: Penalties | None
    choices: Choices
    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


def sample_rows(
    logits: torch.Tensor, rows: Sequence[RowSampling], vocab_start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [num_rows, num_tokens] float32, edited in place (biases, penalties): of the tokens from vocab_start on,
    which are the whole vocabulary where a row filters. Returns the best tokens' values (logits over temperature plus
    noise) [num_rows] float32 and ids [num_rows] int64.
    """
    return sample_device_rows(logits, to_device(rows, logits.device), vocab_start)


def to_device(rows: Sequence[RowSampling], device: torch.device) -> DeviceRows:
    """Copies settings to the device, which waits for it."""
    seeds, positions, sample_indices = (
        integers([getattr(row, name) for row in rows], device) for name in ("seed", "position", "sample_index")
    )
    choices = Choices(floats([row.temperature for row in rows], device), seeds, positions, sample_indices)
    filters = None
    if any(row.filters for row in rows):
        top_p, min_p = (floats([getattr(row, name) for row in rows], device) for name in ("top_p", "min_p"))
        filters = integers([row.top_k for row in rows], device), top_p, min_p
    return DeviceRows(bias_lists(rows, device), stacked_penalties(rows, device), choices, filters)


def sample_device_rows(
    logits: torch.Tensor, rows: DeviceRows, vocab_start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sample_rows; waits for nothing."""
    biases, penalties, choices, filters = rows
    if filters is not None:
        if biases is not None or penalties is not None:  # limits are of the edited logits
            launch_sample(logits, biases, penalties, None, vocab_start=vocab_start)
            biases = penalties = None
        choices = choices._replace(limits=launch_logit_limits(logits, choices.temperature, *filters))
    return launch_sample(logits, biases, penalties, choices, vocab_start=vocab_start)


def bias_lists(rows: Sequence[RowSampling], device: torch.device) -> Biases | None:
    """The biases of all rows one after the other; None when there are none."""
    entries = [entry for row in rows for entry in row.biases]
    if not entries:
        return None
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row.biases))
    ids, values = zip(*entries, strict=True)
    return Biases(integers(starts, device), integers(ids, device), floats(values, device))


def stacked_penalties(rows: Sequence[RowSampling], device: torch.device) -> Penalties | None:
    """The penalties of the rows that have any; None when none has."""
    found = [row.penalties for row in rows if row.penalties is not None]
    if not found:
        return None
    places, next_place = [], 0
    for row in rows:
        places.append(-1 if row.penalties is None else next_place)
        next_place += row.penalties is not None
    return Penalties(
        integers(places, device),
        torch.stack([one.prompt_seen for one in found]),
        torch.stack([one.output_counts for one in found]),
        *(floats([getattr(one, name) for one in found], device) for name in ("presence", "frequency", "repetition")),
    )


def floats(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Numbers of the rows as float32."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def integers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers of the rows as int64."""
    return torch.tensor(values, dtype=torch.int64, device=device)
