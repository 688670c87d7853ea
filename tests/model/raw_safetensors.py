"""Writes .safetensors files byte by byte, right or wrong ones, for tests."""

import json
from pathlib import Path
from typing import Any


def header_bytes(header: Any) -> bytes:
    """Length and JSON of a header; text is taken as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: Any, shape: Any, begin: int, end: int) -> dict[str, Any]:
    """One tensor's header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write header and data as they are given."""
    path.write_bytes(header_bytes(header) + data)
    return path


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]
