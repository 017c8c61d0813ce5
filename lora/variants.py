"""Variants of LoRA. (rsLoRA is one expression in lora/layer.py. LoRA+ is a learning rate: training/optimizer.py.)"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.layer import LoRALinear


class DoRALinear(LoRALinear):
    """DoRA: the length of each row of W, m (d_out,), is trained apart from its direction: W = m (W0 + dW) / ||W0 + dW||.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), equation 5. The norm is taken of each
    row, one for each output, as in the authors' code and in peft; the paper speaks of columns. For the gradient the norm is a
    constant (section 4.3). The bias is not scaled. A row of W0 that is all zeros has no direction and gives NaN.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.reset_magnitude()

    def reset_magnitude(self) -> None:
        """Set m to ||W0 + dW||, so that W starts as W0 + dW."""
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def row_norms(self) -> Tensor:
        """||W0 + dW|| of each row: (d_out,), float32, detached."""
        return torch.linalg.norm(super().merged_weight().detach(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """y + (g - 1) W0 x + g dW x, where y = W0 x + b and g = m / ||W0 + dW||. As in peft, dropout spares only y."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged or self.disable_adapters:
            return y
        g = self.lora_magnitude_vector / self.row_norms()  # in float32: near 1, 16 bits would lose what m learns
        if self.training and self.lora_dropout.p > 0:
            x = self.lora_dropout(x)
            W0x = F.linear(x, self.weight)
        else:
            W0x = y if self.bias is None else y - self.bias
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return y + ((g - 1).to(x.dtype) * W0x + g.to(x.dtype) * F.linear(F.linear(x, A), B) * self.scaling)

    def merged_weight(self) -> Tensor:
        """m (W0 + dW) / ||W0 + dW||, (d_out, d_in)."""
        return (self.lora_magnitude_vector / self.row_norms())[:, None] * super().merged_weight()


def initialise(layer: LoRALinear, how: bool | str) -> None:
    """Starts other than the usual one (True): A normal with deviation 1 / r as in peft ("gaussian"), B not zero (False)."""
    if how == "gaussian":
        nn.init.normal_(layer.lora_A.weight, std=1 / layer.lora_A.out_features)
    elif how is False:
        nn.init.kaiming_uniform_(layer.lora_B.weight, a=math.sqrt(5))
    if isinstance(layer, DoRALinear):  # m depends on A and B
        layer.reset_magnitude()
