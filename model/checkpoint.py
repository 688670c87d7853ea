"""Weights from a checkpoint into a rank's parameters: each rank reads its own slices only, straight into place.

    with Checkpoint(folder) as checkpoint:
        parameters = load_parameters(checkpoint, family, spec, shard, dtype, device)

Everything that headers can tell about the whole model is checked before any weight is read; every value read is checked
to be finite. Peak memory: the shard, plus a staging buffer of at most STAGING_BYTES (or the widest row) for what needs
a conversion or a transposition, plus one slab (model/quantize.py) when weights are quantised as they arrive.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from shoal.kernels.weight import RoundedWeight
from shoal.model.checkpoint_files import Checkpoint, check_tensors
from shoal.model.families.family import Family
from shoal.model.families.names import Source, logical_shapes
from shoal.model.parameters import local_parameters
from shoal.model.quantize import Slab, new_parameter, slabs
from shoal.model.safetensors_file import CheckpointError, SafetensorsFile, TensorInfo
from shoal.model.shard import ModelShard
from shoal.model.spec import DecoderSpec
from shoal.parallel.sharding import Range

__all__ = ["Checkpoint", "CheckpointError", "check_tensors", "load_parameters"]

STAGING_BYTES = 8 << 20
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Block(NamedTuple):
    """A rectangle of a file: `outer` runs of `inner` elements, outer_stride elements apart from byte `begin` on, and
    where it goes.

    dest: [outer, inner], a view of the local tensor.
    """

    file: SafetensorsFile
    info: TensorInfo
    begin: int
    outer: int
    outer_stride: int
    inner: int
    dest: torch.Tensor


def source_blocks(
    file: SafetensorsFile, info: TensorInfo, source: Source, ranges: tuple[Range, ...], dest: torch.Tensor
) -> Iterator[Block]:
    """The file rectangles behind a block of a logical parameter. dest: the block's view, [rows, columns] or [rows]."""
    row_start, row_stop = ranges[0]
    column_start, column_stop = ranges[1] if len(ranges) == 2 else (0, 1)
    columns = column_stop - column_start
    if dest.dim() == 1:
        dest = dest.unsqueeze(1)
    group = source.group_rows or max(row_stop, 1)
    row = row_start
    while row < row_stop:
        within = row % group
        rows = min(row_stop - row, group - within)
        element = (
            source.offset
            + (row // group) * source.group_stride
            + within * source.row_stride
            + column_start * source.column_stride
        )
        begin, view = info.begin + element * info.itemsize, dest[row - row_start : row - row_start + rows]
        if source.column_stride == 1 and not (columns == 1 and source.row_stride == 1):
            yield Block(file, info, begin, rows, source.row_stride, columns, view)
        else:  # stored transposed, or a vector: the runs go along the rows
            yield Block(file, info, begin, columns, source.column_stride, rows, view.t())
        row += rows


class Reader:
    """Reads blocks into local tensors through one bounded staging buffer."""

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self.device = device
        self.staging = torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.staging_view = self.staging.numpy().data

    def read(self, block: Block) -> None:
        """Fill block.dest. Raises CheckpointError naming file and tensor when a value is not finite in the run's
        type.
        """
        stored, size = TORCH_DTYPES[block.info.dtype], block.info.itemsize
        contiguous = block.outer_stride == block.inner or block.outer == 1
        direct = contiguous and self.device.type == "cpu" and stored == block.dest.dtype and block.dest.is_contiguous()
        if direct:
            block.file.read_into(block.dest.view(torch.uint8).flatten().numpy().data, block.begin)
            self.check_finite(block, block.dest)
            return
        run = block.inner * size
        if not contiguous:
            block.file.will_need(block.begin, block.begin + (block.outer - 1) * block.outer_stride * size + run)
        step = max(1, len(self.staging_view) // run)
        for start in range(0, block.outer, step):
            count, begin = min(step, block.outer - start), block.begin + start * block.outer_stride * size
            if contiguous:
                block.file.read_into(self.staging_view[: count * run], begin)
            else:
                for row in range(count):
                    out = self.staging_view[row * run : (row + 1) * run]
                    block.file.read_into(out, begin + row * block.outer_stride * size)
            staged = self.staging[: count * run].view(stored).view(count, block.inner)
            self.check_finite(block, staged)
            block.dest[start : start + count].copy_(staged)

    def check_finite(self, block: Block, values: torch.Tensor) -> None:
        """aminmax propagates NaN and infinities and is the fastest single pass there is."""
        low, high = (bound.item() for bound in torch.aminmax(values))
        where = f"{block.file.path}: tensor {block.info.name!r}"
        if not (float("-inf") < low and high < float("inf")):
            raise CheckpointError(
                f"{where} holds a value that is not finite (NaN or infinity); the checkpoint is damaged"
            )
        limit = torch.finfo(block.dest.dtype).max
        if max(-low, high) > limit:
            raise CheckpointError(
                f"{where} holds {max(-low, high):g}, beyond {block.dest.dtype} ({limit:g}): "
                "set model.dtype to bfloat16 or float32"
            )


def plan_blocks(
    checkpoint: Checkpoint,
    sources: dict[str, Source],
    spec: DecoderSpec,
    shard: ModelShard,
    tensors: dict[str, torch.Tensor | RoundedWeight],
) -> list[Block]:
    """Every block this rank reads into place, in the order of the files: those of tensors that are not quantised."""
    blocks: list[Block] = []
    for parameter in local_parameters(spec, shard):
        tensor = tensors[parameter.name]
        if isinstance(tensor, RoundedWeight):
            continue
        for part in parameter.parts:
            dest = tensor[tuple(slice(start, stop) for start, stop in part.dest)]
            if dest.numel() == 0:
                continue
            if dest.dim() > len(part.source):
                dest = dest.squeeze(0)
            source = sources[part.logical]
            file, info = checkpoint.tensors[source.tensor]
            blocks.extend(source_blocks(file, info, source, part.source, dest))
    return sorted(blocks, key=lambda block: (block.file.path.name, block.begin))


def load_parameters(
    checkpoint: Checkpoint,
    family: Family,
    spec: DecoderSpec,
    shard: ModelShard,
    dtype: torch.dtype,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """This rank's parameters by local name (model/parameters.py), shapes as in its table, of `dtype` on `device`;
    RoundedWeights where the shard is quantised.

    on_progress(bytes so far, bytes in all) is called after every block. Raises CheckpointError: what headers show for
    the whole model before anything is read, values that are not finite while reading.
    """
    sources = check_tensors(checkpoint, family, spec)
    device = torch.device(device)
    tensors = {p.name: new_parameter(p, dtype, device) for p in local_parameters(spec, shard)}
    blocks = plan_blocks(checkpoint, sources, spec, shard, tensors)
    rounded = plan_slabs(checkpoint, sources, spec, shard, tensors)
    every = blocks + [
        block
        for slab in rounded
        for block in slab_blocks(checkpoint, sources, slab, torch.empty(slab.shape, device="meta"))
    ]
    sizes = [block.outer * block.inner * block.info.itemsize for block in every]
    widest = max((block.inner * block.info.itemsize for block in every), default=0)
    reader = Reader(device, max(widest, min(STAGING_BYTES, max(sizes, default=0))))
    total, done = sum(sizes), 0

    def read(some: list[Block]) -> None:
        nonlocal done
        for block in some:
            reader.read(block)
            done += block.outer * block.inner * block.info.itemsize
            if on_progress is not None:
                on_progress(done, total)

    read(blocks)
    for slab in rounded:
        values = torch.empty(slab.shape, device=slab.weight.device)
        read(slab_blocks(checkpoint, sources, slab, values))
        slab.weight.put(slab.column, values)
    return tensors


def plan_slabs(
    checkpoint: Checkpoint,
    sources: dict[str, Source],
    spec: DecoderSpec,
    shard: ModelShard,
    tensors: dict[str, torch.Tensor | RoundedWeight],
) -> list[Slab]:
    """Every slab that is quantised on this rank, in the order of the files."""
    widths = {name: shape[-1] for name, shape in logical_shapes(spec).items()}
    found: list[Slab] = []
    for parameter in local_parameters(spec, shard):
        weight = tensors[parameter.name]
        if isinstance(weight, RoundedWeight):
            found.extend(slabs(parameter, weight, widths))

    def place(slab: Slab) -> tuple[str, int, int]:
        file, info = checkpoint.tensors[sources[slab.logical].tensor]
        return file.path.name, info.begin, slab.source[0][0]

    return sorted(found, key=place)


def slab_blocks(checkpoint: Checkpoint, sources: dict[str, Source], slab: Slab, values: torch.Tensor) -> list[Block]:
    """The file rectangles of a slab. values: float32 of its shape, where they go."""
    source = sources[slab.logical]
    file, info = checkpoint.tensors[source.tensor]
    return list(source_blocks(file, info, source, slab.source, values))
