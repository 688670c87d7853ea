"""Shoal's demo model for training: a small Llama in plain torch, its parts named as in Hugging Face's files.

6 query heads over 2 KV heads make tensor parallel sizes 2, 3 and 4 interesting, 6 layers pipelines of 2 and 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shape suffixes: B rows of a batch, T tokens in a row, N = B * T, D hidden size, H heads, K KV heads, C head_dim,
# V vocabulary.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 4096,
}


class Attention(nn.Module):
    """Causal attention, query heads in groups over fewer KV heads, rotary positions (halves, not pairs)."""

    def __init__(self) -> None:
        super().__init__()
        dim, head_dim = CONFIG["hidden_size"], CONFIG["head_dim"]
        self.q_proj = nn.Linear(dim, CONFIG["num_attention_heads"] * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, CONFIG["num_key_value_heads"] * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, CONFIG["num_key_value_heads"] * head_dim, bias=False)
        self.o_proj = nn.Linear(CONFIG["num_attention_heads"] * head_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, CONFIG["head_dim"])).transpose(1, 2)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC

        q_BHTC, k_BKTC, v_BKTC = (
            rotate(heads(self.q_proj(x_BTD))),
            rotate(heads(self.k_proj(x_BTD))),
            heads(self.v_proj(x_BTD)),
        )
        group = q_BHTC.shape[1] // k_BKTC.shape[1]
        k_BHTC, v_BHTC = (x.repeat_interleave(group, dim=1) for x in (k_BKTC, v_BKTC))
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        return self.o_proj(y_BHTC.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        dim, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        dim, eps = CONFIG["hidden_size"], CONFIG["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """Token ids `[B, T]` to the last hidden states `[B, T, D]`; the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        dim = CONFIG["hidden_size"]
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], dim)
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(dim, CONFIG["rms_norm_eps"])
        frequencies = CONFIG["rope_theta"] ** (-torch.arange(0, CONFIG["head_dim"], 2) / CONFIG["head_dim"])
        angles = torch.outer(torch.arange(CONFIG["max_position_embeddings"]), frequencies).repeat(1, 2)
        self.rope = (angles.cos(), angles.sin())
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # every layer begins as the identity
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=CONFIG["initializer_range"])

    def forward(self, ids_BT: Tensor) -> Tensor:
        cos_TC, sin_TC = (table[: ids_BT.shape[1]] for table in self.rope)
        x_BTD = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TC, sin_TC)
        return self.norm(x_BTD)


class TiedLoss(torch.autograd.Function):
    """Summed cross entropy of `h_ND @ w_VD.T` in chunks of rows that stay in the cache; gradients made on the way."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
        dh_ND, dw_VD, total = torch.empty_like(h_ND), torch.zeros_like(w_VD), h_ND.new_zeros(())
        chunks = (torch.split(x, 256) for x in (h_ND, dh_ND, targets_N))
        for h, dh, targets in zip(*chunks, strict=True):
            logits = h @ w_VD.T
            log_z = logits.logsumexp(-1, keepdim=True)
            total += (log_z - logits.gather(1, targets[:, None])).sum()
            p = logits.sub_(log_z).exp_()
            p[torch.arange(len(targets)), targets] -= 1
            torch.mm(p, w_VD, out=dh)
            dw_VD.addmm_(p.T, h)
        ctx.save_for_backward(dh_ND, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dh_ND, dw_VD = ctx.saved_tensors
        return dh_ND * grads[0], dw_VD * grads[0], None


def summed_loss(model: Llama, rows_BT: Tensor) -> Tensor:
    """Cross entropy in nats, summed over `[B, T + 1]` rows of which each token but the first is predicted."""
    hidden_BTD = model(rows_BT[:, :-1])
    targets_N = rows_BT[:, 1:].flatten()
    loss: Tensor = TiedLoss.apply(hidden_BTD.flatten(0, 1), model.embed_tokens.weight, targets_N)
    return loss
