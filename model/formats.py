"""What checkpoints Shoal does not run, refused by name with what to do instead. No torch."""

import os
from pathlib import Path
from typing import Any

from shoal.model.safetensors_file import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
QUANTISED = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
}
OLD_SETTINGS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
"""Files in which first releases of these tools say what config.json says today."""
INSTEAD = (
    "which Shoal does not run: use the model's unquantised checkpoint (float32, bfloat16 or float16 safetensors), or "
    "dequantise this one and save it with save_pretrained"
)


def refuse_quantised(config: dict[str, Any], where: str) -> None:
    """Raise ValueError when the weights are quantised, by the method's name and with what to do instead. Scales of an
    FP8 cache alone (compressed-tensors without groups of weights) are no hindrance.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings and not only_of_cache(settings):
        raise ValueError(
            f"{where}: the checkpoint is quantised with {quantisation_method(settings)} (quantization_config), "
            f"{INSTEAD}"
        )


def only_of_cache(settings: Any) -> bool:
    """Whether a quantization_config speaks of keys and values alone."""
    named = isinstance(settings, dict) and settings.get("quant_method") == "compressed-tensors"
    return named and settings.get("kv_cache_scheme") is not None and not settings.get("config_groups")


def quantisation_method(settings: Any) -> str:
    """What a quantization_config names, or shows without naming it (first releases of bitsandbytes)."""
    if not isinstance(settings, dict):
        return str(settings)
    method = settings.get("quant_method")
    if method is None:
        return "bitsandbytes" if any(name.startswith("load_in_") for name in settings) else "an unnamed method"
    return QUANTISED.get(str(method).lower(), str(method))


def refuse_old_quantised(folder: Path) -> None:
    """Raise ValueError for a folder that says beside config.json that its weights are quantised."""
    for name, method in OLD_SETTINGS.items():
        if (folder / name).is_file():
            raise ValueError(f"{folder / name}: the checkpoint is quantised with {method}, {INSTEAD}")


def refuse_other_formats(folder: Path) -> None:
    """Raise CheckpointError when the path is, or holds only, something else than safetensors: what, and the way out."""
    advice = "not supported; use the model's Hugging Face safetensors checkpoint"
    if folder.suffix.lower() == ".gguf":
        raise CheckpointError(f"{folder}: GGUF files are {advice}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give the folder of a Hugging Face checkpoint")
    names = sorted(os.listdir(folder))
    if SINGLE in names or INDEX in names:
        return
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{folder}: holds GGUF files, which are {advice}")
    pickled = [name for name in names if name.endswith(PICKLED) and not name.startswith("training_args")]
    if pickled:
        raise CheckpointError(
            f"{folder}: holds {pickled[0]}, a pickled checkpoint, which can run code when it is opened and is not "
            "supported. Convert it to safetensors: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(f"{folder}: holds a LoRA adapter, not a model; merge it into its base model, save that")


def missing_weights(folder: Path) -> CheckpointError:
    """The error for a folder without weights that can be read, to be raised."""
    refuse_other_formats(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; it holds {', '.join(found[:4])}, but no index: download {INDEX} too" if found else ""
    return CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}{hint}")
