"""Softmax attention, fused where that is possible."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, (B, heads, tokens, features) each, fused where that is possible."""
    # The fused kernels have neither a forward-mode derivative nor a batching rule (torch 2.13).
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(q)
    if transformed or forward_ad.unpack_dual(q).tangent is not None:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
