"""LoRA: fine-tune a large weight matrix by training two thin matrices beside it.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1, equation 3.

A linear layer computes y = W0 x + b, and fine-tuning changes its weight by some update dW. LoRA freezes W0 and writes the
update as a product of two thin matrices:

    y = W0 x + b + dW x,    dW = (alpha / r) B A

    W0     (d_out, d_in)    the pretrained weight, frozen
    A      (r, d_in)        trained, starts at random
    B      (d_out, r)       trained, starts at zero
    r                       the rank of the update, much smaller than d_in and d_out
    alpha                   a constant that scales the update

Few numbers are trained. A projection of DistilBERT has 768 x 768 = 589,824 weights; with r = 2, A and B together have
2 x 768 + 768 x 2 = 3,072. Only these need gradients, optimizer state and space in the saved file.

Training starts at the pretrained model. B is zero, so dW is zero and the first output does not change. A must not be zero as
well: each matrix gets its gradient through the other, so two zero matrices would never move.

The scale is alpha / r. Dividing by r reduces the need to tune the learning rate again when r changes. In this project's
experiment alpha / r = 16 / 2 = 8.

After training LoRA costs nothing. dW has the shape of W0, so `merge` adds it, and the layer is a plain linear layer again.

Read on in lora/inject.py, which puts these layers into a whole model. tests/test_the_paper.py tests the paper's claims.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import UserError


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update beside its weight: (..., d_in) -> (..., d_out).

    `weight` and `bias` are those of the layer it replaces: the same tensors under the same names, so the keys of a checkpoint
    stay valid. `inject` freezes them. A and B are float32, even beside a 16-bit weight.

    linear: the layer to replace. Its mode, training or evaluation, is kept.
    lora_dropout: probability of dropout on the input of A.
    use_rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732).
    """

    bias: Tensor | None  # type: ignore[assignment]
    W0: Tensor | None  # while merged: the pretrained weight, kept aside because `weight` holds W0 + dW

    def __init__(self, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a second weight
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features, self.in_features = linear.weight.shape
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=linear.weight.device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=linear.weight.device, dtype=torch.float32)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.disable_adapters = False
        self.register_buffer("W0", None, persistent=False)
        # a = sqrt(5) gives U(-1 / sqrt(d_in), 1 / sqrt(d_in)), as in nn.Linear, and for A in the authors' code and in peft
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain layer with the present `weight` (W0 + dW while merged) and `bias`: the same tensors, not copies."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # W0 x + b
        if self.merged or self.disable_adapters:
            return y
        # cast the two thin matrices to the type of x: cheaper than peft's way, which casts x to float32
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return y + F.linear(F.linear(self.lora_dropout(x), A), B) * self.scaling  # + (alpha / r) B A x

    def delta_weight(self) -> Tensor:
        """dW = (alpha / r) B A, (d_out, d_in), in the type of A and B even under autocast."""
        with torch.autocast("cpu" if self.weight.is_meta else self.weight.device.type, enabled=False):
            return self.lora_B.weight @ self.lora_A.weight * self.scaling

    @property
    def merged(self) -> bool:
        return self.W0 is not None

    def merged_weight(self) -> Tensor:
        """W0 + dW, (d_out, d_in), whether merged or not."""
        return (self.weight if self.W0 is None else self.W0) + self.delta_weight()

    @torch.inference_mode(False)  # a tensor made in inference mode could never be trained
    @torch.no_grad()
    def merge(self) -> None:
        """Set `weight` to W0 + dW, so that LoRA costs nothing at inference (section 4.1). A second call changes nothing.

        Raises UserError if the sum is not finite; `weight` then stays as it is.
        """
        if self.merged:
            return
        merged = self.merged_weight().to(self.weight.dtype)
        if not merged.isfinite().all():
            raise UserError("W0 + dW is not finite: the adapter is damaged or too large for the weight's type. Train it again")
        self.W0, self.weight.data = self.weight.data, merged

    def unmerge(self) -> None:
        """Set `weight` back to W0, bit for bit. (Subtracting dW would leave rounding errors behind.)"""
        if self.W0 is not None:
            self.weight.data, self.W0 = self.W0, None
