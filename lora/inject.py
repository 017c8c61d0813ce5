"""LoRA in a whole model, of whatever kind: find the targets, swap them, freeze the rest, count, switch off, merge, take out."""

import contextlib
import copy
import re
import typing
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from errors import UserError
from lora.config import LoraConfig
from lora.layer import LoRALinear
from lora.variants import DoRALinear, initialise


class ModuleToSave(nn.Module):
    """A module trained in full, the head as a rule: a float32 copy that is trained beside the frozen original.

    The original is what the switched-off adapter gives back, and what counts the head twice among "all" parameters.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.trained_module = copy.deepcopy(module).float().requires_grad_(True)
        self.enabled = True
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.original_module(*args, **kwargs)
        args = tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
        return self.trained_module(*args, **kwargs)


def inject(model: nn.Module, config: LoraConfig) -> list[str]:
    """Put LoRA into `model`, in place, and freeze all of it but the adapters, the head and the biases asked for.

    Returns what to call the adapted layers in a list of targets.

    Raises UserError if a target matches nothing or is no linear layer, and if LoRA is in the model already.
    """
    if any(isinstance(module, LoRALinear | ModuleToSave) for module in model.modules()):
        raise UserError("LoRA is in this model already: unload() it first")
    head = modules_to_save(model, config)
    targets = target_modules(model, config, head)

    model.requires_grad_(False)
    for name in targets:
        linear = typing.cast(nn.Linear, model.get_submodule(name))
        r, alpha = of_its_own(config.rank_pattern, name, config.r), of_its_own(config.alpha_pattern, name, config.lora_alpha)
        kind = DoRALinear if config.use_dora else LoRALinear
        layer = kind.from_linear(linear, r, alpha, config.lora_dropout, config.use_rslora)
        initialise(layer, config.init_lora_weights)
        _put(model, name, layer)
        if config.bias == "lora_only":
            _train_bias(layer)
    if config.bias == "all":
        for name, module in model.named_modules():
            if not _within(name, head):
                _train_bias(module)
    for name in head:
        _put(model, name, ModuleToSave(model.get_submodule(name).requires_grad_(False)))
    return _short_names(model, targets)


def target_modules(model: nn.Module, config: LoraConfig, head: list[str]) -> list[str]:
    """The full names of the linear layers that `config.target_modules` means, in the model's order."""
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    wanted = config.target_modules
    if not wanted:
        raise UserError(f"target_modules is empty; it can name any of: {_ends(linear)}")
    if wanted == "all-linear":
        found = [name for name in linear if not _within(name, head)]
    elif isinstance(wanted, str):
        try:
            found = [name for name in modules if re.fullmatch(wanted, name)]
        except re.error as error:
            raise UserError(f"target_modules is {wanted!r}, which is no regular expression: {error}") from error
    else:
        for end in wanted:
            if not any(_ends_in(name, end) for name in modules):
                raise UserError(f"target_modules: no layer is called {end!r}; there are: {_ends(linear)}")
        found = [name for name in modules if any(_ends_in(name, end) for end in wanted)]
    if config.layers_to_transform is not None:
        chosen = config.layers_to_transform
        numbers = [chosen] if isinstance(chosen, int) else chosen
        found = [name for name in found if name in wanted or _layer_number(name) in numbers]  # a whole name means itself
        if not found:
            raise UserError(f"layers_to_transform is {chosen!r}, and none of those layers has a target")
    if not found:
        raise UserError(f"target_modules is {wanted!r}, which matches no layer; there are: {_ends(linear)}")
    for name in found:
        if name not in linear:
            raise UserError(f"target_modules: {name} is a {type(modules[name]).__name__}; LoRA here adapts linear layers only")
        if _within(name, head):
            raise UserError(f"target_modules: {name} is trained in full already (modules_to_save): leave it out of one of them")
    return found


def _short_names(model: nn.Module, targets: list[str]) -> list[str]:
    """The ends of the targets' names if these mean the same layers, or the whole names: what any version of peft reads."""
    ends = sorted({name.rpartition(".")[2] for name in targets})
    meant = [name for name, _ in model.named_modules() if any(_ends_in(name, end) for end in ends)]
    return ends if sorted(meant) == sorted(targets) else sorted(targets)


def modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the modules that are trained in full: the head, and what `config.modules_to_save` adds."""
    ends = config.modules_to_save or []
    names = [name for name, _ in model.named_modules() if name]
    for end in ends:
        if not any(_ends_in(name, end) for name in names) and end not in ("classifier", "score"):  # peft lists both, always
            raise UserError(f"modules_to_save: no module is called {end!r}; there are: {_ends(names)}")
    is_head = re.compile(r"(.*\.)?(\w*classifier|score)").fullmatch if config.task_type == "SEQ_CLS" else lambda name: None
    found: list[str] = []
    for name in names:
        if (is_head(name) or any(_ends_in(name, end) for end in ends)) and not _within(name, found):
            found.append(name)
    return found


def of_its_own(patterns: dict[str, Any], name: str, usual: Any) -> Any:
    """The value of the first pattern that the end of `name` matches, or the usual one."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return usual


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all), counted as peft counts: a trained head beside its frozen original counts twice among all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` is the base model exactly, head and biases included; after it, what it was before."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear | ModuleToSave)]
    enabled = [layer.enabled for layer in layers]
    merged = [layer for layer in layers if isinstance(layer, LoRALinear) and layer.merged]
    biases = [module for module in model.modules() if getattr(module, "trained_bias", 0) is None]  # those in use
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
    layers = [module for module in model.modules() if isinstance(module, LoRALinear) and not module.merged]
    try:
        for layer in layers:
            layer.merge()
    except UserError:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Make every weight W0 again, bit for bit."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.unmerge()


def unload(model: nn.Module, keep: bool) -> None:
    """Take LoRA out of `model`, which is as it was before then (its parameters still frozen), or, with `keep`, merged."""
    if keep:
        merge(model)
    else:
        unmerge(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "original_bias"):
            module.bias.data = module.bias.data.to(module.original_bias.dtype) if keep else module.original_bias
            del module.original_bias, module.trained_bias
        if isinstance(module, LoRALinear):
            linear = nn.Linear(module.in_features, module.out_features, device="meta")
            linear.weight, linear.bias = module.weight, module.bias  # type: ignore[assignment]
            _put(model, name, linear.train(module.training))
        elif isinstance(module, ModuleToSave):
            dtype = next(module.original_module.parameters()).dtype
            _put(model, name, module.trained_module.to(dtype) if keep else module.original_module)
    model.requires_grad_(False)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _train_bias(module: nn.Module) -> None:
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        module.register_buffer("original_bias", bias.detach().clone(), persistent=False)  # what disabled() gives back ...
        module.register_buffer("trained_bias", None, persistent=False)  # ... and where the trained one is until then
        bias.data = bias.data.float()
        bias.requires_grad_(True)


def _layer_number(name: str) -> int | None:
    """The first number in a name, where peft looks for it: behind two components at least, and not at the end."""
    return next((int(part) for part in name.split(".")[2:-1] if part.isdecimal()), None)


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _ends(names: list[str]) -> str:
    """The distinct last components of names, for a message."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join([end for end in ends if not end.isdecimal()][:20])
