"""The verbs that peft's users know, each a line or two over lora/inject.py."""

import contextlib
from typing import Any

from torch import nn

from lora import inject
from lora.layer import LoraConfig


class PeftModel(nn.Module):
    """A model with LoRA in it. Whatever is not found here is the wrapped model's own."""

    def __init__(self, model: nn.Module, config: LoraConfig):
        super().__init__()
        inject.inject(model, config)
        self.base_model = model
        self.peft_config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return inject.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """`with model.disable_adapter():` the model is the base model exactly, its original head included."""
        return inject.disabled(self)

    def merge_adapter(self) -> None:
        inject.merge(self)

    def unmerge_adapter(self) -> None:
        inject.unmerge(self)

    def merge_and_unload(self) -> nn.Module:
        """The model passed to get_peft_model, with the adapters added to its weights and the trained head in its place."""
        inject.unload(self.base_model, keep=True)
        return self.base_model

    def unload(self) -> nn.Module:
        """The model passed to get_peft_model as it was, its original head included; its parameters stay frozen."""
        inject.unload(self.base_model, keep=False)
        return self.base_model


def get_peft_model(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Put LoRA into `model` (in place: no weight is copied but the head's) and wrap it.

    Raises UserError if a target matches nothing or is no linear layer, and if LoRA is in the model already.
    """
    return PeftModel(model, config)
