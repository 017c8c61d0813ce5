"""What is trained in full beside the adapters: modules, most often the new classification head, and biases.

Both keep their original values, which `disable_adapter` and `unload` bring back.
"""

import copy
from typing import Any

from torch import Tensor, nn

from lora.layer import LoRALinear
from lora.targets import is_within


class ModulesToSaveWrapper(nn.Module):
    """A frozen module and a float32 copy of it that is trained; peft's class of the same name.

    As in peft the original stays, so that the head counts twice among "all" parameters.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.trained_module = copy.deepcopy(module).float().requires_grad_(True)
        self.disable_adapters = False
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        """Attributes that a model reads from its head, such as `classifier.weight`, come from the module in use."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "trained_module"):  # not set yet
                raise
            return getattr(self.original_module if self.disable_adapters else self.trained_module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In a 16-bit model, the input is cast to float32 for the trained copy, and the output is cast back."""
        if self.disable_adapters:
            return self.original_module(*args, **kwargs)
        dtype = next((arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()), None)
        trained_dtype = next((parameter.dtype for parameter in self.trained_module.parameters()), dtype)
        args = tuple(arg.to(trained_dtype) if dtype and getattr(arg, "dtype", None) == dtype else arg for arg in args)
        output = self.trained_module(*args, **kwargs)
        return output.to(dtype) if dtype and isinstance(output, Tensor) else output

    def unwrap(self, trained: bool) -> nn.Module:
        """The trained copy, in the type of the original, or the original."""
        if not trained:
            return self.original_module
        dtype = next((parameter.dtype for parameter in self.original_module.parameters()), None)
        return self.trained_module.to(dtype)


def train_biases(model: nn.Module, which: str, head: list[str]) -> None:
    """Train biases in place: all of them outside the head ("all"), those of the adapted layers ("lora_only"), or none.

    Each module keeps the value of its bias that is not in use, at first the original one, in a buffer.
    """
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
    return [module for module in model.modules() if "other_bias" in module._buffers]
