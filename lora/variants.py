"""LoRA's variants, each in a few lines beside the idea. rsLoRA is one expression in lora/layer.py, LoRA+ is in optimizer.py."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.layer import LoRALinear


class DoRALinear(LoRALinear):
    """W = m (W0 + dW) / ||W0 + dW||, row by row, and m (d_out,) is trained, too: length apart from direction.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), equation 5, with a length for each
    output as in the authors' code and peft (the paper writes of columns). The norm is a constant for the gradient (section
    4.3), and the bias stays as it is. A row of W0 that is all zeros has no direction and gives NaN.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.reset_magnitude()

    def reset_magnitude(self) -> None:
        """m = ||W0 + dW||: the layer starts as W0 + dW is."""
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def row_norms(self) -> Tensor:
        """||W0 + dW|| of each row, (d_out,) in float32, detached."""
        return torch.linalg.norm(super().merged_weight().detach(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """y + (g - 1) W0 x + g dW x, with y = W0 x + b and g = m / ||W0 + dW||. As in peft, dropout spares y only."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged or not self.enabled:
            return y
        g = self.lora_magnitude_vector / self.row_norms()  # near 1, where 16 bits would lose what m learns
        if self.training and self.lora_dropout.p > 0:
            x = self.lora_dropout(x)
            W0x = F.linear(x, self.weight)
        else:
            W0x = y if self.bias is None else y - self.bias
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        return y + ((g - 1).to(x.dtype) * W0x + g.to(x.dtype) * F.linear(F.linear(x, A), B) * self.scaling)

    def merged_weight(self) -> Tensor:
        return (self.lora_magnitude_vector / self.row_norms())[:, None] * super().merged_weight()


def initialise(layer: LoRALinear, how: bool | str) -> None:
    """Where it is not as usual: A normal with deviation 1 / r, as peft has it ("gaussian"), or B not zero (False); then m."""
    if how == "gaussian":
        nn.init.normal_(layer.lora_A.weight, std=1 / layer.lora_A.out_features)
    elif how is False:
        nn.init.kaiming_uniform_(layer.lora_B.weight, a=math.sqrt(5))
    if isinstance(layer, DoRALinear):
        layer.reset_magnitude()
