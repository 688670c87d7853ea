"""The safetensors reader: right files are read exactly, wrong ones refused with file and tensor named."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from shoal.model.safetensors_file import CheckpointError, SafetensorsFile
from tests.model.raw_safetensors import entry, header_bytes, write

GOOD = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}


def test_tensors_have_the_shapes_types_and_bytes_the_library_wrote(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.arange(5, dtype=np.int64)}
    save_file(arrays, tmp_path / "f.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in file.tensors.items()} == {
        "x": ("F32", (2, 3)),
        "y": ("I64", (5,)),
    }
    for name, array in arrays.items():
        info = file.tensors[name]
        assert file.read_bytes(info.begin, info.end - info.begin) == array.tobytes()
    file.close()
    file.close()


def test_bytes_read_counts_the_header_and_every_range(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "f.safetensors", GOOD, bytes(32)))
    header = len(header_bytes(GOOD))
    assert file.bytes_read == header
    file.read_into(memoryview(bytearray(7)), header)
    assert file.bytes_read == header + 7
    file.close()


def test_empty_tensors_and_scalars_are_legal(tmp_path: Path) -> None:
    header = {"none": entry("F32", [0, 7], 0, 0), "scalar": entry("F16", [], 0, 2)}
    file = SafetensorsFile(write(tmp_path / "f.safetensors", header, bytes(2)))
    assert file.tensors["none"].shape == (0, 7)
    assert file.tensors["scalar"].shape == ()
    file.close()


def test_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", GOOD, bytes(32))
    file = SafetensorsFile(path)
    os.truncate(path, file.size - 10)
    with pytest.raises(CheckpointError, match="it shrank while it was read"):
        file.read_bytes(file.tensors["a"].begin, 32)
    file.close()


def changed(**entries: Any) -> bytes:
    return header_bytes({**GOOD, **entries}) + bytes(32)


BROKEN = {
    "empty file": (b"", "0 bytes are too few"),
    "header beyond the limit": ((1 << 60).to_bytes(8, "little") + bytes(64), "exceeds the limit of 100000000"),
    "header beyond the file": ((1 << 20).to_bytes(8, "little") + b"{}", "does not fit the file"),
    "header cut off": (header_bytes(GOOD)[:-20], "does not fit the file's"),
    "no JSON": (header_bytes(b"{not json"), "the header is not valid JSON"),
    "no UTF-8": (header_bytes(b'{"\xff": 1}'), "the header is not valid JSON"),
    "deep JSON": (header_bytes(b"[" * 100000), "the header is not valid JSON"),
    "list": (header_bytes([]), "must be a JSON object"),
    "same name twice": (
        header_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(GOOD["a"]).encode(),) * 2)) + bytes(24),
        "'a' occurs twice",
    ),
    "metadata": (changed(__metadata__={"format": 1}), "__metadata__ must map strings to strings"),
    "entry": (changed(a={"dtype": "F32"}), "tensor 'a': its header entry must hold exactly dtype, shape"),
    "unknown dtype": (changed(a=entry("F31", [2, 3], 0, 24)), "tensor 'a': unknown dtype 'F31'"),
    "negative size": (changed(a=entry("F32", [-2, -3], 0, 24)), "tensor 'a': shape must be a list of non-negative"),
    "bool size": (changed(a=entry("F32", [True, 6], 0, 24)), "tensor 'a': shape must be a list of non-negative"),
    "offsets": (changed(a={**GOOD["a"], "data_offsets": [24]}), r"tensor 'a': data_offsets must be \[begin, end\]"),
    "reversed offsets": (changed(a=entry("F32", [2, 3], 24, 0)), "tensor 'a': data_offsets must be"),
    "extent": (changed(a=entry("F32", [2, 2], 0, 24)), r"tensor 'a': shape \[2, 2\] of F32 needs 16 bytes"),
    "odd bits": (header_bytes({"a": entry("F4", [3], 0, 2)}) + bytes(2), "tensor 'a': shape"),
    "overlap": (changed(b=entry("BF16", [4], 20, 28)), "tensor 'b' overlaps the tensor before it"),
    "hole": (changed(b=entry("BF16", [2], 28, 32)), "tensor 'b' leaves a hole of 4 bytes before it"),
    "truncated": (header_bytes(GOOD) + bytes(31), "tensor 'b' ends at byte .* it is truncated"),
    "surplus bytes": (header_bytes(GOOD) + bytes(33), "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before
