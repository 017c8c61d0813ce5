"""PeftModel and get_peft_model: the methods that peft's users know, each a line or two over inject.py and adapter.py."""

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora import adapter, inject
from lora.config import LoraConfig
from lora.layer import LoRALinear
from lora.modules_to_save import ModulesToSaveWrapper
from lora.targets import short_names


class PeftModel(nn.Module):
    """A model with LoRA in it. Attributes that are not defined here are those of the wrapped model, `base_model`."""

    base_model: nn.Module

    def __init__(self, model: nn.Module, config: LoraConfig):
        super().__init__()
        self._attach(model, config)

    def _attach(self, model: nn.Module, config: LoraConfig) -> None:
        model = model.base_model if isinstance(model, PeftModel) else model  # a wrapper that was left after unload()
        inject.inject(model, config)
        self.base_model = model
        targets = _names_of(model, LoRALinear) if config.target_modules == "all-linear" else config.target_modules
        self.peft_config = dataclasses.replace(
            config,
            target_modules=targets,
            modules_to_save=_names_of(model, ModulesToSaveWrapper),
            base_model_name_or_path=config.base_model_name_or_path or getattr(model, "name_or_path", None) or None,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet
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
        """`with model.disable_adapter():` within the block this is exactly the base model, its original head included."""
        return inject.disable_adapter(self)

    def merge_adapter(self) -> None:
        """Add every dW to its W0. A merged adapter is not trained. Raises UserError if a sum is not finite."""
        inject.merge(self)

    def unmerge_adapter(self) -> None:
        """Restore every W0, bit for bit."""
        inject.unmerge(self)

    def merge_and_unload(self) -> nn.Module:
        """The original model object, with every dW added to its weight and the trained head in place. Its parameters stay
        frozen. Raises UserError if a sum is not finite."""
        inject.unload(self.base_model, merged=True)
        return self.base_model

    def unload(self) -> nn.Module:
        """The original model object as it was before LoRA, head included, except that its parameters stay frozen."""
        inject.unload(self.base_model, merged=False)
        return self.base_model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter into `folder` as peft does: configuration and weights, head included.

        Raises UserError if a weight is not finite, if `folder` holds a whole model, or if it cannot be written.
        """
        adapter.save_adapter(self.base_model, self.peft_config, folder)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> "PeftModel":
        """Load an adapter, written here or by peft, into `model`, in place. It is frozen and in evaluation mode unless
        `is_trainable`.

        Raises UserError, with `model` unchanged, if the folder holds no adapter or one that does not fit the model.
        """
        config, tensors = _read_for(model, folder)
        loaded = cls(model, config)
        loaded._fill(tensors, is_trainable)
        return loaded

    def load_adapter(self, folder: str | Path, *, is_trainable: bool = False) -> None:
        """Replace this adapter with another. The base model is neither copied nor loaded again.

        (In peft the new adapter joins the present one, under a name of its own.) Raises UserError, with the present adapter
        unchanged, if the folder holds no adapter or one that does not fit the model.
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
    """Put LoRA into `model` and wrap it. This happens in place; only the head is copied.

    Raises UserError, with `model` unchanged, if it contains LoRA already, or if `config` names a layer that is missing, not
    linear, or part of the head.
    """
    return PeftModel(model, config)


def _names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return short_names(model, [name for name, module in model.named_modules() if isinstance(module, kind)])


def _read_for(model: nn.Module, folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter and check that it fits, on a copy of the model without data: a bad adapter changes nothing."""
    config, tensors = adapter.read_adapter(folder)
    model = model.base_model if isinstance(model, PeftModel) else model
    data = [*model.parameters(), *model.buffers()]
    skeleton = copy.deepcopy(model, {id(tensor): _without_data(tensor) for tensor in data})
    inject.unload(skeleton, merged=False)
    inject.inject(skeleton, config)
    return config, adapter.match_tensors(skeleton, tensors, Path(folder) / adapter.WEIGHTS_FILE)


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
