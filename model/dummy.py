"""Random weights made in place (`load_format: dummy`): the same model whatever the layout, without reading a file.

Every logical parameter's value at [row, column] depends on the seed, its name and its position alone, so the shards of
any layout are slices of one model. A row is a stretch of one table of normal numbers, at an offset hashed from seed,
name and row: as fast as copying. Matrices have variance 1 / columns, norms are the identity, biases and sinks small.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from shoal.kernels.weight import RoundedWeight
from shoal.model.families.names import logical_shapes
from shoal.model.parameters import LocalParameter, Part, local_parameters
from shoal.model.quantize import new_parameter, slabs
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec, Norm

TABLE_SIZE = 1 << 21
SPAN = TABLE_SIZE // 2  # offsets lie below it, so that rows of up to as many columns end within the table
SLAB_ELEMENTS = 1 << 22  # most elements drawn at once
SMALL = 0.02


def row_offsets(seed: int, name: str, first: int, stop: int) -> torch.Tensor:
    """Offsets into the table of rows [first, stop) of a logical parameter, by splitmix64 of the row. Returns int64."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    x = np.arange(first, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)  # arrays wrap silently
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) % np.uint64(SPAN)).astype(np.int64))


def norms_by_name(spec: DecoderSpec) -> dict[str, Norm]:
    """The norms of the model by the names of their logical parameters."""
    found = {"final_norm": spec.final_norm}
    for index, layer in enumerate(spec.layers):
        for name in ("pre_mixer_norm", "post_mixer_norm", "pre_ffn_norm", "post_ffn_norm"):
            found[f"layers.{index}.{name}"] = getattr(layer, name)
        qk_norm = layer.mixer.qk_norm
        for name in ("q_norm", "k_norm"):
            found[f"layers.{index}.mixer.{name}"] = None if qk_norm is None else qk_norm.norm
    return {name: norm for name, norm in found.items() if norm is not None}


class _Source:
    """Draws parts of logical parameters into local tensors."""

    def __init__(self, spec: DecoderSpec, seed: int) -> None:
        self.seed, self.norms, self.scale = seed, norms_by_name(spec), spec.hidden_size**-0.5
        self.table = torch.empty(TABLE_SIZE).normal_(generator=torch.Generator().manual_seed(seed & (2**63 - 1)))

    def fill(self, target: torch.Tensor, part: Part) -> None:
        """Write the part's values; target: the block of the local tensor it goes to, [..., rows, columns] or
        [elements].
        """
        (first, stop), *columns = part.source
        module, _, kind = part.logical.rpartition(".")
        if module in self.norms:
            target.fill_(1.0 if kind == "weight" and not self.norms[module].unit_offset else 0.0)
            return
        start, end = columns[0] if columns else (0, 1)
        assert end <= SPAN, f"{part.logical} has over {SPAN} columns"
        rows, step = self.table.unfold(0, end - start, 1), max(1, SLAB_ELEMENTS // (end - start))
        target = target.view(stop - first, end - start)
        for low in range(first, stop, step):
            high = min(low + step, stop)
            values = rows[row_offsets(self.seed, part.logical, low, high) + start]
            target[low - first : high - first] = values * (self.scale if columns else SMALL)


def fill_dummy(
    params: Mapping[str, torch.Tensor | RoundedWeight], table: Iterable[LocalParameter], spec: DecoderSpec, seed: int
) -> None:
    """Fill every tensor of the table, which params holds by name, in place. seed: an integer >= 0."""
    source = _Source(spec, seed)
    widths = {name: shape[-1] for name, shape in logical_shapes(spec).items()}
    for parameter in table:
        target = params[parameter.name]
        if isinstance(target, RoundedWeight):
            for slab in slabs(parameter, target, widths):
                values = torch.empty(slab.shape)
                source.fill(values, Part(slab.logical, slab.source, ()))
                slab.weight.put(slab.column, values)
        else:
            for part in parameter.parts:
                source.fill(target[tuple(slice(*bounds) for bounds in part.dest)], part)


def dummy_parameters(
    spec: DecoderSpec, shard: ModelShard, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Any]:
    """The tensors of a rank by name, of random values."""
    table = list(local_parameters(spec, shard))
    params = {parameter.name: new_parameter(parameter, dtype, device) for parameter in table}
    fill_dummy(params, table, spec, seed)
    return params
