"""A short digest of a checkpoint folder, to tell whether two hosts hold the same one. Reads little. No torch.

config.json counts whole; of every weight file its size, its beginning (the header, or a good part of it) and samples
spread over the data, so that another fine-tune of the same shapes differs. Only model.checksums reads every byte.
"""

import hashlib
import os
from pathlib import Path

from shoal.model.checkpoint_files import index_files
from shoal.model.formats import SINGLE

HEAD_BYTES = 1 << 20
SAMPLES, SAMPLE_BYTES = 64, 4096


def checkpoint_digest(folder: Path, weights: bool = True) -> str:
    """32 hexadecimal digits. weights: False leaves the weight files out. Raises CheckpointError, OSError."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    names = [] if not weights else [SINGLE] if (folder / SINGLE).is_file() else index_files(folder)[0]
    for name in names:
        with (folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{name}\0{size}\0".encode())
            digest.update(file.read(HEAD_BYTES))
            for index in range(SAMPLES):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, size * index // SAMPLES))
    return digest.hexdigest()[:32]
