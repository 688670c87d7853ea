"""A Llama checkpoint as GGUF in a type of llama.cpp's, for speed beside it: `python scripts/make_gguf.py DIR OUT TYPE`.

TYPE is bf16, q8_0 or q4_0. In q4_0 the head is Q8_0, as Shoal's int4 has it. Embedding and head have the file's types
but no tokenizer comes along: for llama-bench, which makes its own ids. Needs the gguf package. Only what Llama's own
config.json describes (no biases, no scaled rotary positions).
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

TYPES = {"bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The name of a Hugging Face tensor in GGUF."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in top:
        return f"{top[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of query or key heads from halves to pairs: llama.cpp rotates neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(folder: Path, out: Path, kind: str) -> None:
    """Write the file."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if ".q_proj" in name or ".k_proj" in name:
                tensor = interleave(tensor, heads if ".q_proj" in name else kv_heads)
            values = tensor.float().numpy()
            wanted = Type.F32 if values.ndim == 1 else TYPES[kind]
            if wanted == Type.Q4_0 and name == "lm_head.weight":
                wanted = Type.Q8_0
            data = gguf.quants.quantize(np.ascontiguousarray(values), wanted)
            writer.add_tensor(gguf_name(name), data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
