"""The scales of FP8 keys and values that a checkpoint holds beside its weights, by the names that vLLM knows:
`model.layers.3.self_attn.k_scale` and `v_scale`, or the same under `attn.`, `k_proj.` and `v_proj.`. No torch.
"""

import re
import struct
from collections.abc import Mapping
from math import inf

from shoal.model.safetensors_file import CheckpointError, SafetensorsFile, TensorInfo

_NAME = re.compile(r"layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.)?([kv])_scale")
_FORMATS = {"F32": "<f", "F16": "<e"}


def is_kv_scale(name: str) -> bool:
    """Whether a checkpoint's tensor of this name is such a scale."""
    return _NAME.search(name) is not None


def read_kv_scales(tensors: Mapping[str, tuple[SafetensorsFile, TensorInfo]]) -> dict[int, tuple[float, float]]:
    """The scales of keys and of values of the layers that have any, 1 where only the other has one.

    tensors: of an open Checkpoint. Raises CheckpointError for a scale that is not one positive number.
    """
    found: dict[int, dict[str, float]] = {}
    for name, (file, info) in tensors.items():
        match = _NAME.search(name)
        if match is not None:
            found.setdefault(int(match[1]), {})[match[2]] = _read_one(file, info)
    return {layer: (scales.get("k", 1.0), scales.get("v", 1.0)) for layer, scales in found.items()}


def _read_one(file: SafetensorsFile, info: TensorInfo) -> float:
    """The number of a tensor of one element."""
    value, size = None, info.end - info.begin
    if info.dtype in _FORMATS and size == struct.calcsize(_FORMATS[info.dtype]):
        (value,) = struct.unpack(_FORMATS[info.dtype], file.read_bytes(info.begin, size))
    elif info.dtype == "BF16" and size == 2:
        (value,) = struct.unpack("<f", b"\0\0" + file.read_bytes(info.begin, size))
    if value is None or not 0.0 < value < inf:
        what = f"{info.dtype} {list(info.shape)}" if value is None else str(value)
        raise CheckpointError(
            f"{file.path}: {info.name!r} is {what}; the scale of an FP8 cache is one positive number, F32, F16 or BF16"
        )
    return float(value)
