"""The verbs that peft's users know, each a line or two over lora/inject.py and lora/adapter.py."""

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora import adapter, inject
from lora.config import LoraConfig


class PeftModel(nn.Module):
    """A model with LoRA in it. Whatever is not found here is the wrapped model's own."""

    base_model: nn.Module

    def __init__(self, model: nn.Module, config: LoraConfig):
        super().__init__()
        self._attach(model, config)

    def _attach(self, model: nn.Module, config: LoraConfig) -> None:
        model = model.base_model if isinstance(model, PeftModel) else model  # unloaded, as inject will see
        inject.inject(model, config)
        self.base_model = model
        self.peft_config = dataclasses.replace(
            config,
            target_modules=inject.adapted(model) if config.target_modules == "all-linear" else config.target_modules,
            modules_to_save=inject.saved(model),
            base_model_name_or_path=config.base_model_name_or_path or getattr(model, "name_or_path", None) or None,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return inject.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        inject.print_trainable_parameters(self)

    def disable_adapter(self) -> contextlib.AbstractContextManager[None]:
        """`with model.disable_adapter():` the model is the base model exactly, its original head included."""
        return inject.disabled(self)

    def merge_adapter(self) -> None:
        """Add every dW to its W0. While merged, adapters are not trained. UserError if a sum is not finite."""
        inject.merge(self)

    def unmerge_adapter(self) -> None:
        """Every W0 as it was, bit for bit."""
        inject.unmerge(self)

    def merge_and_unload(self) -> nn.Module:
        """The model passed to get_peft_model, with the adapters added to its weights and the trained head in its place."""
        inject.unload(self.base_model, merged=True)
        return self.base_model

    def unload(self) -> nn.Module:
        """The model passed to get_peft_model as it was, its original head included; its parameters stay frozen."""
        inject.unload(self.base_model, merged=False)
        return self.base_model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter into `folder` as peft does: configuration, weights (head included), model card. No network."""
        adapter.save_adapter(self.base_model, self.peft_config, folder)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> "PeftModel":
        """Put a saved adapter, ours or peft's, into `model`, in place; frozen and in evaluation mode unless `is_trainable`.

        Raises UserError, with `model` untouched, if the folder is no adapter or not one for this model.
        """
        config, tensors = _read_for(model, folder)
        loaded = cls(model, config)
        loaded._fill(tensors, is_trainable)
        return loaded

    def load_adapter(self, folder: str | Path, *, is_trainable: bool = False) -> None:
        """Another adapter in place of this one, on the same base model, which is neither copied nor loaded again.

        (peft's puts it beside the present one, under a name of its own.)
        Raises UserError, with the present adapter untouched, if the folder is no adapter or not one for this model.
        """
        config, tensors = _read_for(self.base_model, folder)
        self._attach(self.unload(), config)
        self._fill(tensors, is_trainable)

    @torch.no_grad()
    def _fill(self, tensors: dict[str, Tensor], is_trainable: bool) -> None:
        for key, tensor in adapter.adapter_tensors(self.base_model).items():
            tensor.copy_(tensors[key])
        if not is_trainable:
            self.requires_grad_(False).eval()


def get_peft_model(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Put LoRA into `model` (in place: no weight is copied but the head's) and wrap it.

    Raises UserError if LoRA is in the model already, and for names in `config` that the model does not have, that are no
    linear layers, or that belong to the head.
    """
    return PeftModel(model, config)


def _read_for(model: nn.Module, folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration and tensors, tried first on a copy of the model without its data: nothing is loaded half."""
    config, tensors = adapter.read_adapter(folder)
    model = model.base_model if isinstance(model, PeftModel) else model
    data = [*model.parameters(), *model.buffers()]
    skeleton = copy.deepcopy(model, {id(tensor): _shape_of(tensor) for tensor in data})
    inject.unload(skeleton, merged=False)
    inject.inject(skeleton, config)
    return config, adapter.match_tensors(skeleton, tensors, Path(folder) / adapter.WEIGHTS_FILE)


def _shape_of(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape
