"""What weights of few bits stand for, as a float32 checkpoint that transformers runs: their oracle on GPUs, where
activations are not rounded.
"""

from pathlib import Path

from safetensors.torch import load_file, save_file

from shoal.kernels.quantized_weight import QuantizedWeight
from shoal.model.shard import Quantization


def rounded_checkpoint(folder: Path, target: Path, quantization: Quantization) -> Path:
    """A float32 checkpoint of the values that the int8 or int4 weights of this one have. target: a new folder.

    For models whose linears are named `*_proj` and `lm_head`, one file each.
    """
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        bits = 8 if name == "lm_head.weight" or quantization == "int8" else 4
        if name.endswith(("_proj.weight", "lm_head.weight")):
            weight = QuantizedWeight(tuple(values.shape), bits)
            weight.put(0, values)
            tensors[name] = weight.dequantize().contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target
