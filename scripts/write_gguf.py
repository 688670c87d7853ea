"""A Llama or Qwen3-MoE checkpoint of Hugging Face as GGUF, for measuring llama.cpp.

    python scripts/write_gguf.py FOLDER FILE [TYPE]

TYPE: q8_0 or q4_0 rounds the matrices (in q4_0 the head is Q8_0, as Shoal's int4 has it); default: as they are stored.
Needs the `gguf` package. There is no tokenizer in the file ("none"), and the rows of query and key projections stay in
Hugging Face's order, which llama.cpp reads in another one: the speed is the model's, the text is not.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(.*)")


def gguf_name(name: str) -> str:
    """The tensor's name in GGUF."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the checkpoint, bfloat16 as uint16; the experts of a layer stacked under one name."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
            if name == "__metadata__":
                continue
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            kind = {"BF16": np.uint16, "F32": np.float32}[entry["dtype"]]
            values = data[start:stop].view(kind).reshape(entry["shape"])
            found = EXPERT.fullmatch(name)
            if found is None:
                yield name, values
            else:
                stacks.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = values
    for name, experts in stacks.items():
        yield name, np.stack([experts[index] for index in range(len(experts))])


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: str | None) -> None:
    """Add a tensor, a matrix rounded to `kind` where one is given. Norms and routers are float32 in GGUF."""
    target = gguf_name(name)
    if values.dtype != np.uint16:
        writer.add_tensor(target, values)
        return
    widened = (values.astype(np.uint32) << 16).view(np.float32)
    if values.ndim == 1 or target.endswith("ffn_gate_inp.weight"):
        writer.add_tensor(target, widened)
    elif kind is None:
        writer.add_tensor(target, values.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
    else:
        rounded = GGMLQuantizationType["Q8_0" if name == "lm_head.weight" else kind]
        writer.add_tensor(target, quantize(widened, rounded), raw_dtype=rounded)


def make_writer(out: str, config: dict[str, Any]) -> GGUFWriter:
    """A writer with the model's sizes."""
    experts = config.get("num_experts") or config.get("num_local_experts")  # as transformers 5 spells it
    if config["model_type"] not in ARCHITECTURES:
        sys.exit(f"{config['model_type']} cannot be written, only {', '.join(ARCHITECTURES)}")
    writer = GGUFWriter(out, ARCHITECTURES[config["model_type"]])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("none")
    return writer


def main() -> None:
    """Write the file."""
    folder, out = Path(sys.argv[1]), sys.argv[2]
    kind = sys.argv[3].upper() if len(sys.argv) > 3 else None
    writer = make_writer(out, json.loads((folder / "config.json").read_text()))
    for name, values in read_tensors(folder):
        add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
