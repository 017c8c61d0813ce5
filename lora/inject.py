"""LoRA in a whole model, of any kind. Three lines are the core; the rest finds the layers, trains the head, and goes back:

model.requires_grad_(False)
for name in targets:  # the q_lin and v_lin of each layer, for example
    model.set_submodule(name, LoRALinear(model.get_submodule(name), r, lora_alpha))
"""

import contextlib
import typing
from collections.abc import Iterator

import torch
from torch import nn

from lora.config import LoraConfig
from lora.errors import UserError
from lora.layer import LoRALinear
from lora.modules_to_save import ModulesToSaveWrapper, train_biases, unload_biases, use_biases
from lora.targets import find_head, find_targets, pattern_values
from lora.variants import DoRALinear, initialise


@torch.inference_mode(False)  # a tensor made in inference mode could never be trained
def inject(model: nn.Module, config: LoraConfig, strict: bool = True) -> None:
    """Put LoRA into `model`, in place. Only the adapters, the head and the biases that `config` asks for stay trainable.

    Raises UserError, with `model` unchanged, if it contains LoRA already, or if (`strict`) a name in `config` matches nothing.
    """
    if adapted_modules(model):
        raise UserError("this model contains LoRA already. Call unload() first")
    head = find_head(model, config, strict)
    targets = find_targets(model, config, head, strict)
    if config.bias != "none" and any(p.dtype != torch.float32 for name, p in model.named_parameters() if name.endswith("bias")):
        raise UserError(f"bias is {config.bias!r}: biases are trained in float32. Load the base model with float32 biases")
    ranks = pattern_values("rank_pattern", config.rank_pattern, targets, config.r, strict)
    alphas = pattern_values("alpha_pattern", config.alpha_pattern, targets, config.lora_alpha, strict)

    layer_class = DoRALinear if config.use_dora else LoRALinear
    model.requires_grad_(False)
    for name in targets:
        linear = typing.cast(nn.Linear, model.get_submodule(name))
        layer = layer_class(linear, ranks[name], alphas[name], config.lora_dropout, config.use_rslora)
        initialise(layer, config.init_lora_weights)
        model.set_submodule(name, layer)
    train_biases(model, config.bias, head)
    for name in head:
        model.set_submodule(name, ModulesToSaveWrapper(model.get_submodule(name).requires_grad_(False)))


def adapted_modules(model: nn.Module, kinds: typing.Any = LoRALinear | ModulesToSaveWrapper) -> list:
    return [module for module in model.modules() if isinstance(module, kinds)]


def check_enabled(model: nn.Module) -> None:
    if any(module.disable_adapters for module in adapted_modules(model)):
        raise UserError("the adapter is disabled here. Call this after the disable_adapter() block or enable_adapter_layers()")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, as peft counts: a trained head and its frozen original both count among all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def enable(model: nn.Module, enabled: bool) -> bool:
    """Compute with all that was trained, or exactly as the base model, unmerged. Returns whether trained biases were in use."""
    for module in adapted_modules(model):
        module.disable_adapters = not enabled
    if not enabled:
        unmerge(model)
    return use_biases(model, trained=enabled)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is exactly the base model, head and biases included. Afterwards its state is restored.

    Raises UserError at the end if a merged adapter was changed within, and its sum is not finite. It is then unmerged.
    """
    modules = [(module, module.disable_adapters) for module in adapted_modules(model)]
    merged = [layer for layer in adapted_modules(model, LoRALinear) if layer.merged]
    trained_biases = enable(model, False)
    try:
        yield
    finally:
        use_biases(model, trained_biases)
        for module, was_disabled in modules:
            module.disable_adapters = was_disabled
        for layer in merged:
            layer.merge()


def merge(model: nn.Module) -> None:
    """Merge every adapter into its weight.

    Raises UserError, with every weight unchanged, if a sum is not finite, if a weight is shared, or if LoRA is disabled.
    """
    check_enabled(model)
    layers = [layer for layer in adapted_modules(model, LoRALinear) if not layer.merged]
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
    """Set every adapted weight back to W0, bit for bit."""
    for layer in adapted_modules(model, LoRALinear):
        layer.unmerge()


@torch.inference_mode(False)
def unload(model: nn.Module, merged: bool) -> nn.Module:
    """Take LoRA out of `model`, in place, and return it, frozen. Raises UserError as `merge` does.

    `merged`: keep what was learned (dW in the weights, the trained head and biases). Otherwise restore the base model.
    """
    check_enabled(model)
    (merge if merged else unmerge)(model)
    unload_biases(model, trained=merged)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.to_linear())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.unwrap(trained=merged))
    return model.requires_grad_(False)
