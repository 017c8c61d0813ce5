"""Training biases beside the adapters: `LoraConfig(bias="all")` or `bias="lora_only"`, as in peft. The default is "none".

A bias is trained in place, under its own name. Its module keeps the value that is not in use, at first the original one, in a
buffer, `other_bias`. While the adapter is disabled the two values change places.
"""

import torch
from torch import nn

from lora.errors import UserError
from lora.layer import LoRALinear
from lora.targets import is_within


def check_biases(model: nn.Module, which: str) -> None:
    """Raises UserError if biases are to be trained and are not float32: small steps would be lost to rounding."""
    if which != "none" and any(p.dtype != torch.float32 for name, p in model.named_parameters() if name.endswith("bias")):
        raise UserError(f"bias is {which!r}: biases are trained in float32. Load the base model with float32 biases")


def train_biases(model: nn.Module, which: str, head: list[str]) -> None:
    """Make biases trainable: all of them outside the head ("all"), those of the adapted layers ("lora_only"), or none."""
    for name, module in model.named_modules():
        chosen = not is_within(name, head) if which == "all" else which == "lora_only" and isinstance(module, LoRALinear)
        bias = getattr(module, "bias", None)
        if chosen and isinstance(bias, nn.Parameter) and not bias.requires_grad:  # a shared bias is prepared once
            module.register_buffer("other_bias", bias.detach().clone(), persistent=False)
            module.bias_is_trained = True
            bias.requires_grad_(True)


def use_biases(model: nn.Module, trained: bool) -> bool:
    """Give every bias its trained value, or its original one. Returns whether the trained ones were in use."""
    modules = _trained(model)
    were_trained = all(module.bias_is_trained for module in modules)
    for module in modules:
        if module.bias_is_trained != trained:
            module.bias.data, module.other_bias, module.bias_is_trained = module.other_bias, module.bias.data, trained
    return were_trained


def unload_biases(model: nn.Module, trained: bool) -> None:
    """Stop training biases: keep the trained values, or restore the original ones."""
    use_biases(model, trained)
    for module in _trained(model):
        del module.other_bias, module.bias_is_trained


def _trained(model: nn.Module) -> list:
    return [module for module in model.modules() if hasattr(module, "other_bias")]
