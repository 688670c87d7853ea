"""The files of a checkpoint folder: which there are, that they are whole, and that they hold exactly what a model
needs. No torch.

    checkpoint = Checkpoint(folder)                    # index and headers, checked
    sources = check_tensors(checkpoint, family, spec)  # every parameter of the whole model found, in the right shape
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from shoal.model.families.family import Family
from shoal.model.families.names import Source, logical_shapes
from shoal.model.formats import INDEX, SINGLE, missing_weights, refuse_other_formats
from shoal.model.kv_scales import is_kv_scale
from shoal.model.safetensors_file import CheckpointError, SafetensorsFile, TensorInfo, unique_keys
from shoal.model.spec import DecoderSpec

LOADABLE = ("F32", "F16", "BF16")
MAX_JSON_BYTES = 200_000_000
MAX_LISTED = 8  # problems spelled out in one error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_JSON_BYTES} bytes; this is not the file it should be")
        value = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def index_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The shard files named by the index, and its weight map. Raises CheckpointError naming what is wrong or
    missing.
    """
    path = folder / INDEX
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: weight_map must be an object that maps tensors to files")
    for tensor, name in weights.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} is said to be in {name!r}, which is not a safetensors file of the folder"
            )
    names = sorted(set(weights.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files named by {INDEX} are missing: "
            f"{', '.join(missing[:MAX_LISTED])}; the download is not complete"
        )
    return names, weights


class Checkpoint:
    """The weight files of a folder, opened, with checked headers; no weights are read. A context manager.

    config: the parsed file. tensors: name -> (file, TensorInfo). Raises CheckpointError (a ValueError) that names file
    and tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            refuse_other_formats(self.folder)
        self.config = read_json(self.folder / "config.json")
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, tuple[SafetensorsFile, TensorInfo]] = {}
        try:
            self.open_files()
        except BaseException:
            self.close()
            raise

    def open_files(self) -> None:
        """Open the single file or the indexed ones and check that they agree with the index."""
        weights: dict[str, str] | None = None
        if (self.folder / SINGLE).is_file():
            names = [SINGLE]
        elif (self.folder / INDEX).is_file():
            names, weights = index_files(self.folder)
        else:
            raise missing_weights(self.folder)
        for name in names:
            file = SafetensorsFile(self.folder / name)
            self.files.append(file)
            for tensor, info in file.tensors.items():
                if tensor in self.tensors:
                    raise CheckpointError(
                        f"{file.path}: tensor {tensor!r} is in {self.tensors[tensor][0].path.name} too"
                    )
                self.tensors[tensor] = (file, info)
        for tensor, name in (weights or {}).items():
            if tensor not in self.tensors or self.tensors[tensor][0].path.name != name:
                raise CheckpointError(
                    f"{self.folder / name}: tensor {tensor!r} is not in this file, where {INDEX} says it is"
                )

    @property
    def bytes_read(self) -> int:
        """Bytes requested from the weight files so far, headers included."""
        return sum(file.bytes_read for file in self.files)

    def close(self) -> None:
        """Close the files. Idempotent."""
        for file in self.files:
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_tensors(checkpoint: Checkpoint, family: Family, spec: DecoderSpec) -> dict[str, Source]:
    """Find every parameter of the whole model (not of one shard) in the headers. Reads no weights.

    Raises CheckpointError that lists missing, misshapen, untyped and surplus tensors, each with its file.
    """
    sources = family.sources(spec, checkpoint.tensors)
    shapes = logical_shapes(spec)
    problems, needed = [], set()
    for logical, source in sources.items():
        needed.add(source.tensor)
        if source.tensor not in checkpoint.tensors:
            problems.append(f"tensor {source.tensor!r} is missing (it holds {logical} {list(shapes[logical])})")
            continue
        file, info = checkpoint.tensors[source.tensor]
        if info.shape != source.shape:
            problems.append(
                f"{file.path}: tensor {info.name!r} has shape {list(info.shape)}, config.json makes it "
                f"{list(source.shape)}"
            )
        if info.dtype not in LOADABLE:
            problems.append(
                f"{file.path}: tensor {info.name!r} is stored as {info.dtype}; supported are {', '.join(LOADABLE)}"
            )
    for tensor, (file, info) in checkpoint.tensors.items():
        if tensor not in needed and not family.is_ignorable(tensor, spec) and not is_kv_scale(tensor):
            problems.append(
                f"{file.path}: tensor {tensor!r} {list(info.shape)} is surplus: "
                f"no part of a {family.name} model needs it"
            )
    if problems:
        problems = list(dict.fromkeys(problems))
        listed = "\n  ".join(problems[:MAX_LISTED])
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(f"{checkpoint.folder}: the weights do not match config.json:\n  {listed}{more}")
    return sources


def check_headers(folder: str | Path, family: Family, spec: DecoderSpec) -> None:
    """What the headers of a folder's weights show about the whole model, without reading a weight. Raises
    CheckpointError.
    """
    with Checkpoint(folder) as checkpoint:
        check_tensors(checkpoint, family, spec)


def read_manifest(manifest: Path) -> dict[str, str]:
    """File name -> SHA-256 of a manifest in sha256sum's format. Raises CheckpointError naming the line."""
    sums: dict[str, str] = {}
    for number, line in enumerate(manifest.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        digest, _, name = line.partition(" ")
        name = name.removeprefix(" ").removeprefix("*").removeprefix("./")
        if len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef") or not name:
            raise CheckpointError(f"{manifest}:{number}: expected `<64 hex digits>  <file name>`, got {line!r:.100}")
        sums[name] = digest.lower()
    return sums


def verify_checksums(folder: str | Path, manifest: str | Path) -> int:
    """Hash every weight file once and compare it with the manifest; to be called once per host. Returns the number of
    bytes hashed.

    Raises CheckpointError naming the file that differs, or a weight file that the manifest does not list.
    """
    folder, manifest = Path(folder), Path(manifest)
    if not manifest.is_file():
        raise CheckpointError(f"model.checksums = {str(manifest)!r}: no such file")
    sums, total = read_manifest(manifest), 0
    weights = [SINGLE] if (folder / SINGLE).is_file() else index_files(folder)[0]
    for name in weights:
        if name not in sums:
            raise CheckpointError(f"{folder / name}: the manifest {manifest} has no sum for it")
    for name in sorted(sums):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: listed in {manifest}, but missing")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sums[name]:
            raise CheckpointError(f"{path}: SHA-256 is {digest}, {manifest} says {sums[name]}; download the file again")
        total += path.stat().st_size
    return total
