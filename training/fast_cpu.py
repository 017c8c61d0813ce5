"""The same arithmetic in less time on a CPU. You do not need this file to understand the rest.

`with Fast(model, dtype):` replaces three functions of torch by faster ones; the model itself does not change. What each one
buys depends on the processor: `python bench/tricks.py` measures it, and bench/README.md has the figures of two.
"""

import functools
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WORD = 1 << 16  # dropout draws 16 random bits per element
SMALLEST = 64  # rows and columns of a weight that int8 rounds: the small last layer of a head is not worth its rounding error
FEW_ROWS = 128  # up to which a packed float32 weight is faster
TINY = 1e-30  # instead of zero, in a divisor
HALF = torch.tensor(128.5)  # 128, the zero of an unsigned byte, and 0.5, so that cutting the fraction off rounds


class Fast(TorchFunctionMode):
    """Sends linear layers with a frozen weight, dropout and attention to the functions below.

    Weights are packed once. So freeze, cast and merge first: a weight replaced later is computed by torch itself.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        self.packed: dict[int, Float32Weight | BFloat16Weight | Int8Weight] = {}
        for weight in [weight.detach() for weight in linear if not weight.requires_grad]:
            if dtype == torch.bfloat16 and can_pack():
                self.packed[weight.data_ptr()] = BFloat16Weight(weight)
            elif dtype == torch.int8 and min(weight.shape) >= SMALLEST:
                self.packed[weight.data_ptr()] = Int8Weight(weight)
            elif dtype == torch.float32 and torch.backends.mkldnn.is_available():
                self.packed[weight.data_ptr()] = Float32Weight(weight)
        self.functions: dict[Callable, Callable] = {F.linear: self.linear, F.dropout: dropout}
        self.functions[F.scaled_dot_product_attention] = attention

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        packed = self.packed.get(weight.data_ptr())
        if isinstance(packed, Float32Weight) and packed.is_faster(x):
            return packed.product(x, bias)
        if packed is None or isinstance(packed, Float32Weight):
            return F.linear(x, weight, bias)
        return PackedLinear.apply(x, packed, bias)


def limit_caches() -> None:
    """For training: keep fewer compiled products. Call it before the first product.

    oneDNN and torch each keep 1,024, one per shape. In training shapes rarely repeat, and smaller caches save 1.2 GB of an
    epoch's peak memory. Texts that are labelled one by one need the large caches.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "8")


def fast_if_cpu(model: nn.Module, device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return Fast(model, dtype) if device.type == "cpu" else nullcontext()


def dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout`, but one 64-bit random word serves four elements, where torch draws one number per element.

    p is rounded to a multiple of 1/65536. What remains is scaled by 1 / (1 - the rounded p).
    """
    drop = min(round(p * WORD), WORD - 1)
    if not training or not drop:
        return x
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)  # None: all 64 bits, no upper limit
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    scale = torch.tensor(WORD / (WORD - drop), dtype=x.dtype)
    if x.element_size() == 2:  # (0 or 1) * (the bits of `scale` as an integer) = the bits of 0.0 or `scale`: no conversion
        keep = torch.ge(bits, drop - WORD // 2, out=torch.empty_like(bits))
        return x * keep.mul_(scale.view(torch.int16)).view(x.dtype)
    return x * (bits >= drop - WORD // 2).to(x.dtype).mul_(scale)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """`F.scaled_dot_product_attention`, with the dropout above; torch's own computes in float32 when it drops out.

    Without dropout, torch's wins in float32, and in bfloat16 from about 200 tokens on.
    """
    if not dropout_p and (k.dtype == torch.float32 or k.shape[2] > 128):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return dropout(scores.softmax(dim=-1), dropout_p) @ v


class PackedLinear(torch.autograd.Function):
    """x W^T + b with a packed weight. Its two copies (one in inference) take 170 MB for DistilBERT in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: "BFloat16Weight | Int8Weight", bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return packed.product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        grad_x = ctx.packed.transposed.product(grad_output) if ctx.needs_input_grad[0] else None
        grad_bias = grad_output.flatten(0, -2).sum(dim=0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


def can_pack() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Float32Weight:
    """A frozen weight in oneDNN's memory layout, for labelling one short text: there it is faster, for more rows slower.

    It is packed at the first such text.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight

    @functools.cached_property
    def packed(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def is_faster(self, x: Tensor) -> bool:
        return torch.is_inference_mode_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class BFloat16Weight:
    """A frozen weight in oneDNN's own memory layout. An ordinary weight is reordered again for every product."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    @functools.cached_property  # made at the first backward pass: inference has none
    def transposed(self) -> "BFloat16Weight":
        return BFloat16Weight(self.weight.t().contiguous())

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.to(torch.bfloat16)
        return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.packed, bias, "none", [], "")


class Int8Weight:
    """A frozen weight in 8 bits: whole numbers, and a scale for each row. Each row of x is rounded likewise at each product.

    Wortsman et al. 2023 (arXiv:2304.13013), section 2. The relative error is about 1 %. Rows of x do not share a scale, so the
    answer to a text does not depend on the texts beside it. qlinear_pointwise takes ordinary tensors; the older quantised
    tensors are deprecated in torch 2.13.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        # without VNNI, the processor adds two products in 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127 would not
        largest = 127 if torch.cpu._is_vnni_supported() else 64
        self.scale = weight.abs().amax(dim=1).clamp_min(TINY).float() / largest
        self.zero_point = torch.zeros(len(weight), dtype=torch.int64)
        rounded = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)

    @functools.cached_property
    def transposed(self) -> "Int8Weight":
        return Int8Weight(self.weight.t().contiguous())

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_min_(TINY) / 127
        rounded = torch.addcmul(HALF, rows, scale.reciprocal()).to(torch.uint8)  # x / scale + 128, rounded
        weight = self.packed, self.scale, self.zero_point
        y = torch.ops.onednn.qlinear_pointwise(rounded, 1.0, 128, *weight, None, 1.0, 0, torch.float32, "none", [], "")
        y = y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale)
        return y.unflatten(0, x.shape[:-1])
