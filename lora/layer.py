"""LoRA, the idea: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1.

The pretrained weight W0 (d_out, d_in) is frozen. What training adds to it, dW, is kept as the product of two thin matrices
(equation 3):

    y = W0 x + b + dW x,    dW = (alpha / r) B A,    A: (r, d_in),  B: (d_out, r),  r << d_in, d_out

A starts at random and B at zero, so dW starts at zero and the model starts as the pretrained one. To divide by r is meant to
spare a new search for the learning rate when r changes; alpha is a constant beside it (alpha / r = 16 / 2 = 8 in this
experiment). Beside the 768 x 768 = 589,824 frozen weights of one projection, r = 2 trains 2 x 768 + 768 x 2 = 3,072.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.errors import UserError


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update beside its weight: (..., d_in) -> (..., d_out).

    `weight` and `bias` are those of the layer that it replaces, shared and under the same names, so that it renames no key of
    a checkpoint; `inject` freezes them. A and B are float32 whatever the weight is.
    """

    bias: Tensor | None  # type: ignore[assignment]
    W0: Tensor | None  # the pretrained weight, kept aside while `weight` holds W0 + dW

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        nn.Module.__init__(self)  # nn.Linear's own would make and fill a weight that is there already
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=weight.device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=weight.device, dtype=torch.float32)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.enabled = True
        self.register_buffer("W0", None, persistent=False)
        # a = sqrt(5) makes Kaiming's bound 1 / sqrt(d_in): how nn.Linear starts, and A in the authors' code and peft
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> "LoRALinear":
        """Put LoRA beside an existing layer, in training or evaluation mode as that is."""
        return cls(linear.weight, linear.bias, r, lora_alpha, lora_dropout, use_rslora).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # W0 x + b
        if self.merged or not self.enabled:
            return y
        # A and B in the type of x: to cast two thin matrices costs less than to cast x to float32, which is what peft does
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return y + F.linear(F.linear(self.lora_dropout(x), A), B) * self.scaling  # + (alpha / r) B A x

    def delta_weight(self) -> Tensor:
        """dW = (alpha / r) B A, (d_out, d_in) in the type of A and B, under autocast, too."""
        with torch.autocast("cpu" if self.weight.is_meta else self.weight.device.type, enabled=False):
            return self.lora_B.weight @ self.lora_A.weight * self.scaling

    @property
    def merged(self) -> bool:
        return self.W0 is not None

    def merged_weight(self) -> Tensor:
        """W0 + dW, (d_out, d_in)."""
        return (self.weight if self.W0 is None else self.W0) + self.delta_weight()

    @torch.inference_mode(False)  # where it is on, tensors are made that can never be trained again
    @torch.no_grad()
    def merge(self) -> None:
        """Make `weight` W0 + dW, so that LoRA costs nothing at inference (section 4.1). Merging twice is merging once.

        Raises UserError, and leaves `weight` alone, if the sum is not finite.
        """
        if self.merged:
            return
        merged = self.merged_weight().to(self.weight.dtype)
        if not merged.isfinite().all():
            raise UserError("W0 + dW is not finite: the adapter is broken, or too large for the weight's type; train it again")
        self.W0, self.weight.data = self.weight.data, merged

    def unmerge(self) -> None:
        """Make `weight` W0 again, bit for bit (subtracting dW would leave rounding behind)."""
        if self.W0 is not None:
            self.weight.data, self.W0 = self.W0, None
