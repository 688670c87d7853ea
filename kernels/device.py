"""Which path an operation takes: the Triton kernels of kernels/gpu, or torch and C."""

import torch

INTERPRET_CPU_TENSORS = False
"""Tests set this, with TRITON_INTERPRET=1 from the start, to run whole models through the Triton kernels on a CPU."""


def has_gpu_kernels(device: torch.device) -> bool:
    """Whether what lies on this device is computed with by the Triton kernels."""
    return device.type == "cuda" or INTERPRET_CPU_TENSORS


def on_gpu(x: torch.Tensor) -> bool:
    """Whether x is for the Triton kernels: a CUDA tensor of a type they take (float32, bfloat16, float16)."""
    return (x.is_cuda or INTERPRET_CPU_TENSORS) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
