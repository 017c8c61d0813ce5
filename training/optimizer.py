"""What AdamW trains, and at which learning rate."""

from typing import Any

from torch import nn

from common.errors import UserError

HEAD = {"pre_classifier", "classifier"}  # parts of the name of a parameter


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(
    model: nn.Module, learning_rate: float, loraplus_lr_ratio: float = 1.0, head_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for a torch optimizer, each with its peak learning rate as "initial_lr".

    B learns `loraplus_lr_ratio` times as fast as A (LoRA+, Hayou et al. 2024, arXiv:2402.12354), the head `head_lr_ratio`
    times as fast as A. Raises UserError if nothing is trainable.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        is_B = name.endswith(".lora_B.weight")
        is_head = bool(HEAD & set(name.split(".")))
        ratio = loraplus_lr_ratio if is_B else head_lr_ratio if is_head else 1.0
        groups.setdefault(learning_rate * ratio, []).append(parameter)
    if not groups:
        raise UserError("this model has no trainable parameters. Load the adapter with is_trainable=True")
    return [{"params": parameters, "lr": lr, "initial_lr": lr} for lr, parameters in groups.items()]


def lr_multiplier(step: int, steps: int, warmup: float) -> float:
    """The learning rate at `step` (1 to `steps`) as a fraction of its peak. It rises over `warmup` of the steps, then falls."""
    warmup_steps = max(1.0, warmup * steps)
    return min(step / warmup_steps, (steps - step + 1) / (steps - warmup_steps + 1))
