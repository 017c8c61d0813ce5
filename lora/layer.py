"""LoRA, the idea: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1.

The pretrained weight W0 (d_out, d_in) is frozen. What training adds to it, dW, is kept as the product of two thin matrices
(equation 3):

    y = W0 x + b + dW x,    dW = (alpha / r) B A,    A: (r, d_in),  B: (d_out, r),  r << d_in, d_out

A starts at random and B at zero, so dW starts at zero and the model starts as the pretrained one. Of the 768 x 768 = 589,824
weights of one projection in DistilBERT, r = 2 trains 2 x 768 + 768 x 2 = 3,072.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError


@dataclass
class LoraConfig:
    """What to adapt and how, under peft's names. Raises UserError for a value that cannot be meant.

    target_modules: the linear layers to adapt: a list of the ends of their names (["q_lin", "v_lin"]), a regular expression
        that matches whole names, or "all-linear", which is every linear layer outside the head.
    modules_to_save: modules to train in full beside the adapters, by the ends of their names. With task_type "SEQ_CLS" (the
        default here; peft's is None) the head is always among them: what is called "score" or ends in "classifier".
    bias: which biases are trained as well: "none", "all" of the model's, or those of the adapted layers ("lora_only").
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    task_type: str | None = "SEQ_CLS"

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise UserError(f"r is {self.r!r}; the rank of an adapter is a whole number from 1")
        if not self.lora_alpha > 0 or math.isinf(self.lora_alpha):
            raise UserError(f"lora_alpha is {self.lora_alpha!r}; it must be a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout!r}; a probability is at least 0 and less than 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f"bias is {self.bias!r}; it can be none, all or lora_only")
        if self.task_type not in (None, "SEQ_CLS"):
            raise UserError(f"task_type is {self.task_type!r}; this library has SEQ_CLS only")


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update beside its frozen weight: (..., d_in) -> (..., d_out).

    `weight` and `bias` are those of the layer that it replaces, shared and under the same names, so that putting LoRA into a
    model renames no key of its checkpoint. A and B are float32 whatever the weight is.
    """

    bias: Tensor | None  # type: ignore[assignment]
    W0: Tensor | None  # the pretrained weight, kept aside while `weight` holds W0 + dW

    def __init__(self, weight: Tensor, bias: Tensor | None, r: int, lora_alpha: float, lora_dropout: float = 0.0):
        nn.Module.__init__(self)  # nn.Linear's own would make and fill a weight that is there already
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=weight.device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=weight.device, dtype=torch.float32)
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / r
        self.enabled = True
        self.register_buffer("W0", None, persistent=False)
        # a = sqrt(5) makes Kaiming's bound 1 / sqrt(d_in): how nn.Linear starts, and A in the authors' code and peft
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> "LoRALinear":
        """Put LoRA beside an existing layer, which is left in training or evaluation mode as it is."""
        return cls(linear.weight, linear.bias, r, lora_alpha, lora_dropout).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # W0 x + b
        if self.merged or not self.enabled:
            return y
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)  # cheaper than casting x, over 16-bit weights
        return y + F.linear(F.linear(self.lora_dropout(x), A), B) * self.scaling  # + (alpha / r) B A x

    def delta_weight(self) -> Tensor:
        """dW = (alpha / r) B A, (d_out, d_in) in float32."""
        return self.lora_B.weight @ self.lora_A.weight * self.scaling

    @property
    def merged(self) -> bool:
        return self.W0 is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Make `weight` W0 + dW, so that LoRA costs nothing at inference (section 4.1). Merging twice is merging once.

        Raises UserError, and leaves `weight` alone, if the sum is not finite.
        """
        if self.merged:
            return
        merged = (self.weight + self.delta_weight()).to(self.weight.dtype)
        if not merged.isfinite().all():
            raise UserError("W0 + dW is not finite: the adapter is broken, or too large for the weight's type; train it again")
        self.W0, self.weight.data = self.weight.data, merged

    def unmerge(self) -> None:
        """Make `weight` W0 again, bit for bit (subtracting dW would leave rounding behind)."""
        if self.W0 is not None:
            self.weight.data, self.W0 = self.W0, None
