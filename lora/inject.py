"""LoRA in a whole model, of any kind: find the target layers, swap them, freeze the rest.

`inject` is the core. The rest of the file counts parameters, disables and merges the adapters, and takes LoRA out again.
"""

import contextlib
import typing
from collections.abc import Iterator

import torch
from torch import nn

from lora.biases import check_biases, original_biases, train_biases, unload_biases
from lora.config import LoraConfig
from lora.errors import UserError
from lora.layer import LoRALinear
from lora.modules_to_save import ModulesToSaveWrapper
from lora.targets import find_head, find_targets, pattern_value
from lora.variants import DoRALinear, initialise


@torch.inference_mode(False)  # a tensor made in inference mode could never be trained
def inject(model: nn.Module, config: LoraConfig) -> None:
    """Put LoRA into `model`, in place. Only the adapters, the head and the biases that `config` asks for stay trainable.

    Raises UserError, with `model` unchanged, if it contains LoRA already, or if `config` names a layer that is missing, not
    linear, or part of the head.
    """
    if any(isinstance(module, LoRALinear | ModulesToSaveWrapper) for module in model.modules()):
        raise UserError("this model contains LoRA already. Call unload() first")
    head = find_head(model, config)
    targets = find_targets(model, config, head)
    check_biases(model, config.bias)

    model.requires_grad_(False)
    for name in targets:
        linear = typing.cast(nn.Linear, model.get_submodule(name))
        _replace(model, name, _lora_layer(linear, name, config))
    train_biases(model, config.bias, head)
    for name in head:
        _replace(model, name, ModulesToSaveWrapper(model.get_submodule(name).requires_grad_(False)))


def _lora_layer(linear: nn.Linear, name: str, config: LoraConfig) -> LoRALinear:
    r = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    layer_class = DoRALinear if config.use_dora else LoRALinear
    layer = layer_class.from_linear(linear, r, alpha, config.lora_dropout, config.use_rslora)
    initialise(layer, config.init_lora_weights)
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, as peft counts: a trained head and its frozen original both count among all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print both counts and the percentage that is trainable, in peft's words."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is exactly the base model, head and biases included. Afterwards its state is restored."""
    modules = [module for module in model.modules() if isinstance(module, LoRALinear | ModulesToSaveWrapper)]
    enabled = [module.enabled for module in modules]
    merged = [module for module in modules if isinstance(module, LoRALinear) and module.merged]
    with original_biases(model):
        try:
            for module in modules:
                module.enabled = False
            for layer in merged:
                layer.unmerge()
            yield
        finally:
            for layer in merged:
                layer.merge()
            for module, was_enabled in zip(modules, enabled, strict=True):
                module.enabled = was_enabled


def merge(model: nn.Module) -> None:
    """Merge every adapter into its weight.

    Raises UserError, with every weight unchanged, if a sum is not finite, if an adapted weight is shared with another module,
    or within a `disable_adapter` block.
    """
    _refuse_while_disabled(model)
    layers = [module for module in model.modules() if isinstance(module, LoRALinear) and not module.merged]
    owned = [id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
    if any(owned.count(id(layer.weight)) > 1 for layer in layers):
        raise UserError("an adapted layer shares its weight with another module, which a merge would change too. Do not merge")
    try:
        for layer in layers:
            layer.merge()
    except UserError:
        for layer in layers:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Set every adapted weight back to W0, bit for bit. Raises UserError within a `disable_adapter` block."""
    _refuse_while_disabled(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.unmerge()


@torch.inference_mode(False)
def unload(model: nn.Module, merged: bool) -> None:
    """Take LoRA out of `model`, in place. All parameters stay frozen.

    `merged`: keep what was learned (dW in the weights, the trained head and biases). Otherwise restore the base model.
    Raises UserError as `merge` does.
    """
    if merged:
        merge(model)
    else:
        unmerge(model)
    unload_biases(model, trained=merged)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            _replace(model, name, module.to_linear())
        elif isinstance(module, ModulesToSaveWrapper):
            _replace(model, name, module.unwrap(trained=merged))
    model.requires_grad_(False)


def _refuse_while_disabled(model: nn.Module) -> None:
    if any(isinstance(module, LoRALinear | ModulesToSaveWrapper) and not module.enabled for module in model.modules()):
        raise UserError("the adapter is disabled here. Do this outside the disable_adapter() block")
