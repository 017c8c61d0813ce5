"""LoRA in a whole model, of whatever kind: swap the layers, freeze the rest, count, switch off, merge, take out."""

import contextlib
import copy
import typing
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora.config import LoraConfig
from lora.errors import UserError
from lora.layer import LoRALinear
from lora.targets import find_head, find_targets, is_within, pattern_value, short_names
from lora.variants import DoRALinear, initialise


class ModulesToSaveWrapper(nn.Module):
    """A module trained in full, the head as a rule: a float32 copy that is trained beside the frozen original.

    The original is what the switched-off adapter gives back, and what counts the head twice among "all" parameters. Within
    the model, its keys are those of the two children; in an adapter's file, they are what they were.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.trained_module = copy.deepcopy(module).float().requires_grad_(True)
        self.enabled = True
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its head, such as `classifier.weight`, is asked of the one in use."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "trained_module"):  # not there yet
                raise
            return getattr(self.trained_module if self.enabled else self.original_module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original_module(*args, **kwargs)
        dtype = next((arg.dtype for arg in args if _is_float(arg)), None)
        own = next((parameter.dtype for parameter in self.trained_module.parameters()), dtype)
        args = tuple(arg.to(own) if _is_float(arg) else arg for arg in args)
        output = self.trained_module(*args, **kwargs)
        return output.to(dtype) if dtype and isinstance(output, Tensor) else output  # over 16-bit weights, 16 bits again


@torch.inference_mode(False)  # where it is on, tensors are made that can never be trained
def inject(model: nn.Module, config: LoraConfig) -> None:
    """Put LoRA into `model`, in place, and freeze all of it but the adapters, the head and the biases asked for.

    Raises UserError, with `model` untouched, if LoRA is in it already, and for names in `config` that it does not have, that
    are no linear layers, or that belong to the head.
    """
    if any(isinstance(module, LoRALinear | ModulesToSaveWrapper) for module in model.modules()):
        raise UserError("LoRA is in this model already: unload() it first")
    head = find_head(model, config)
    targets = find_targets(model, config, head)
    if config.bias != "none" and any(p.dtype != torch.float32 for name, p in model.named_parameters() if name.endswith("bias")):
        raise UserError(f"bias is {config.bias!r}: what is trained is float32, so load the base model with biases in float32")

    model.requires_grad_(False)
    for name in targets:
        linear = typing.cast(nn.Linear, model.get_submodule(name))
        r = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        kind = DoRALinear if config.use_dora else LoRALinear
        layer = kind.from_linear(linear, r, alpha, config.lora_dropout, config.use_rslora)
        initialise(layer, config.init_lora_weights)
        _put(model, name, layer)
        if config.bias == "lora_only":
            _train_bias(layer)
    if config.bias == "all":
        for name, module in model.named_modules():
            if not is_within(name, head):
                _train_bias(module)
    for name in head:
        _put(model, name, ModulesToSaveWrapper(model.get_submodule(name).requires_grad_(False)))


def adapted(model: nn.Module) -> list[str]:
    """What a list of targets calls the layers that have LoRA beside them."""
    return short_names(model, [name for name, module in model.named_modules() if isinstance(module, LoRALinear)])


def saved(model: nn.Module) -> list[str]:
    """What a list of modules to save calls those that are trained in full."""
    return short_names(model, [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all), counted as peft counts: a trained head beside its frozen original counts twice among all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` is the base model exactly, head and biases included; after it, what it was before."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear | ModulesToSaveWrapper)]
    enabled = [layer.enabled for layer in layers]
    merged = [layer for layer in layers if isinstance(layer, LoRALinear) and layer.merged]
    biases = [m for m in model.modules() if hasattr(m, "original_bias") and m.trained_bias is None]  # not switched off yet
    try:
        for layer in layers:
            layer.enabled = False
        for layer in merged:
            layer.unmerge()
        for module in biases:
            module.trained_bias, module.bias.data = module.bias.data, module.original_bias
        yield
    finally:
        for module in biases:
            module.bias.data, module.trained_bias = module.trained_bias, None  # type: ignore[assignment]
        for layer in merged:
            layer.merge()
        for layer, was in zip(layers, enabled, strict=True):
            layer.enabled = was


def merge(model: nn.Module) -> None:
    """Merge every adapter into its weight, all of them or, if one is not finite (UserError), none."""
    _refuse_while_disabled(model)
    layers = [module for module in model.modules() if isinstance(module, LoRALinear) and not module.merged]
    holders = [id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
    if any(holders.count(id(layer.weight)) > 1 for layer in layers):
        raise UserError("an adapted layer shares its weight with another module, which a merge would change: leave it unmerged")
    try:
        for layer in layers:
            layer.merge()
    except UserError:
        for layer in layers:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Make every weight W0 again, bit for bit."""
    _refuse_while_disabled(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.unmerge()


@torch.inference_mode(False)
def unload(model: nn.Module, merged: bool) -> None:
    """Take LoRA out: `model` as it was before, or, `merged`, with dW in its weights and the trained head in place.

    Its parameters stay frozen. Raises UserError, as merge() does, if a sum is not finite.
    """
    if merged:
        merge(model)
    else:
        unmerge(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "original_bias"):
            module.bias.data = module.bias.data.to(module.original_bias.dtype) if merged else module.original_bias
            del module.original_bias, module.trained_bias
        if isinstance(module, LoRALinear):
            linear = nn.Linear(module.in_features, module.out_features, device="meta")
            linear.weight, linear.bias = module.weight, module.bias  # type: ignore[assignment]
            _put(model, name, linear.train(module.training))
        elif isinstance(module, ModulesToSaveWrapper):
            dtype = next((parameter.dtype for parameter in module.original_module.parameters()), None)
            _put(model, name, module.trained_module.to(dtype) if merged else module.original_module)
    model.requires_grad_(False)


def _refuse_while_disabled(model: nn.Module) -> None:
    if any(isinstance(module, LoRALinear | ModulesToSaveWrapper) and not module.enabled for module in model.modules()):
        raise UserError("the adapter is switched off here: do this outside the disable_adapter() block")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _train_bias(module: nn.Module) -> None:
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter) and not bias.requires_grad:  # else it is another module's, too, and prepared there
        module.register_buffer("original_bias", bias.detach().clone(), persistent=False)  # what disabled() gives back ...
        module.register_buffer("trained_bias", None, persistent=False)  # ... and where the trained one is until then
        bias.requires_grad_(True)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
