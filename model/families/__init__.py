"""One short declarative file per model family: Hugging Face config to DecoderSpec, checkpoint names to parameters. No
torch.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from shoal.model.families import gemma, gpt2, gpt_neox, llama, mistral, mixtral, olmo2, opt, phi3, qwen, qwen_moe
from shoal.model.families.config import HfConfig
from shoal.model.families.family import Family
from shoal.model.formats import refuse_old_quantised, refuse_other_formats, refuse_quantised
from shoal.model.safetensors_file import SafetensorsFile
from shoal.model.spec import DecoderSpec

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    opt.FAMILY,
    gpt_neox.FAMILY,
    llama.FAMILY,
    mistral.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    phi3.FAMILY,
    gemma.GEMMA2,
    gemma.GEMMA3,
    olmo2.FAMILY,
    mixtral.FAMILY,
    qwen_moe.QWEN2_MOE,
    qwen_moe.QWEN3_MOE,
)

STORED: dict[str, Literal["float32", "bfloat16", "float16"]] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def supported_architectures() -> list[str]:
    """Every architecture name Shoal runs."""
    return sorted(name for family in FAMILIES for name in family.architectures)


def load_family(config: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a Hugging Face config, by `architectures`, or by `model_type` when there is none.

    Raises ValueError naming the architecture and the supported ones.
    """
    refuse_quantised(config, where)
    names, model_type = config.get("architectures") or [], config.get("model_type")
    for family in FAMILIES:
        if any(name in family.architectures for name in names) or (not names and model_type in family.model_types):
            return family
    asked = f"architectures = {names!r}" if names else f"model_type = {model_type!r}"
    raise ValueError(f"{where}: {asked} is not supported; supported: {', '.join(supported_architectures())}")


def build_spec(config: dict[str, Any], where: str = "config.json") -> tuple[DecoderSpec, Family]:
    """Spec and family of a parsed config.json. Raises ValueError naming the first field that cannot be honoured."""
    family = load_family(config, where)
    reader = HfConfig(config, where)
    spec = family.spec(reader)
    reader.ignore("quantization_config", "compression_config")  # refuse_quantised lets only those of the cache pass
    reader.finish()
    return spec, family


def load_spec(folder: str | Path) -> tuple[DecoderSpec, Family]:
    """Spec and family of a checkpoint folder's config.json; a type it does not declare is taken from the weights.

    Raises ValueError, OSError when it cannot be read.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        refuse_other_formats(Path(folder))
        raise ValueError(f"{path} is missing: {folder} is not a Hugging Face checkpoint") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    refuse_old_quantised(Path(folder))
    spec, family = build_spec(config, str(path))
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        spec = replace(spec, dtype=stored_dtype(Path(folder)) or spec.dtype)
    return spec, family


def stored_dtype(folder: Path) -> Literal["float32", "bfloat16", "float16"] | None:
    """The type most bytes of the folder's first weight file are stored in, by its header; None without weights."""
    path = min(folder.glob("model*.safetensors"), default=None)
    if path is None:
        return None
    file = SafetensorsFile(path)
    file.close()
    totals = Counter(dict.fromkeys(STORED, 0))
    for info in file.tensors.values():
        totals[info.dtype] += info.end - info.begin
    return max(STORED.items(), key=lambda item: totals[item[0]])[1]
