"""A module that is trained in full beside the adapters. In most models that is the new classification head."""

import copy
from typing import Any

from torch import Tensor, nn


class ModulesToSaveWrapper(nn.Module):
    """A frozen module and a float32 copy of it that is trained; peft's class of the same name.

    `disable_adapter` and `unload` bring the original back. Since it stays, the head counts twice among "all" parameters, as
    it does in peft.
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
        dtype = next((arg.dtype for arg in args if _is_float(arg)), None)
        trained_dtype = next((parameter.dtype for parameter in self.trained_module.parameters()), dtype)
        args = tuple(arg.to(trained_dtype) if _is_float(arg) else arg for arg in args)
        output = self.trained_module(*args, **kwargs)
        return output.to(dtype) if dtype and isinstance(output, Tensor) else output

    def unwrap(self, trained: bool) -> nn.Module:
        """The trained copy, in the type of the original, or the original."""
        if not trained:
            return self.original_module
        dtype = next((parameter.dtype for parameter in self.original_module.parameters()), None)
        return self.trained_module.to(dtype)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
