"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), what it trains, and at which learning rate.

It is PyTorch's own kernel, with the state in plain dictionaries. `torch.optim.AdamW` does the same, but imports PyTorch's
compiler first: 0.9 s and 70 MB, a third of the way to the first step.
"""

from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from common.errors import UserError


class AdamW:
    """Each group is {"params": [...], "lr": ...}; "lr" is read at each step, so that a schedule can set it."""

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float):
        self.param_groups, self.weight_decay = groups, weight_decay
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.state = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "mean": torch.zeros_like(parameter),  # of the gradient: m
                "square": torch.zeros_like(parameter),  # of its square: v
            }
            for parameter in self.parameters
        }

    @torch.no_grad()
    def step(self) -> None:
        """One step, in one kernel for all parameters of a group (fused), which waits for nothing on a GPU."""
        for group in self.param_groups:
            having = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in having]
            adamw(
                having,
                [parameter.grad for parameter in having],
                [state["mean"] for state in states],
                [state["square"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=group["lr"],
                weight_decay=self.weight_decay,
                eps=1e-8,
                maximize=False,
            )

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def parameter_groups(model: nn.Module, learning_rate: float, ratio: float) -> list[dict[str, Any]]:
    """Everything trainable; B learns `ratio` times as fast as the rest (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise UserError("nothing in this model is trainable: load the adapter with is_trainable=True")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        highest = learning_rate * ratio if name.endswith(".lora_B.weight") else learning_rate
        groups.setdefault(highest, []).append(parameter)
    return [{"params": group, "initial_lr": highest} for highest, group in groups.items()]


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate at `step` of 1..steps: up to 1 in warmup * steps, then down towards 0."""
    rising = max(1.0, warmup * steps)
    return min(step / rising, (steps - step + 1) / (steps - rising + 1))
