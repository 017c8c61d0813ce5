"""Which modules a configuration names. Names are matched exactly as peft matches them."""

import re
from typing import Any

from torch import nn

from lora.config import NO_TARGETS, REGEX_ERRORS, LoraConfig, pattern_in_name
from lora.errors import UserError


def find_targets(model: nn.Module, config: LoraConfig, head: list[str]) -> list[str]:
    """The full names of the linear layers to adapt, in the model's order.

    Raises UserError if `target_modules`, or an entry of it, matches nothing, a module that is not linear, or part of the head.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]  # a subclass may compute something else
    wanted = config.target_modules
    if wanted == NO_TARGETS:
        return []
    if not wanted:
        raise UserError(f"target_modules is empty. Choose from: {_last_parts(linear)}")
    if wanted == "all-linear":
        names = [name for name in linear if not is_within(name, head)]
    elif isinstance(wanted, str):
        try:
            names = [name for name in modules if re.fullmatch(wanted, name)]
        except REGEX_ERRORS as error:
            raise UserError(f"target_modules: {wanted!r} is not a valid regular expression: {error}") from error
    else:
        for end in wanted:
            if not any(_ends_in(name, end) for name in modules):
                raise UserError(f"target_modules: no layer is named {end!r}. Choose from: {_last_parts(linear)}")
        names = [name for name in modules if any(_ends_in(name, end) for end in wanted)]
    if config.layers_to_transform not in (None, []):
        chosen = config.layers_to_transform
        numbers = [chosen] if isinstance(chosen, int) else chosen
        full_names = [] if isinstance(wanted, str) else wanted  # an entry that is a full name always counts
        names = [name for name in names if name in full_names or _layer_number(name) in numbers]
        if not names:
            raise UserError(f"layers_to_transform is {chosen!r}, but no layer of that number has a target module")
    if not names:
        raise UserError(f"target_modules: {wanted!r} matches no layer. Choose from: {_last_parts(linear)}")
    for name in names:
        module = modules[name]
        if name not in linear:
            kind = type(module).__name__
            raise UserError(f"target_modules: {name} is of type {kind}. Only plain linear layers can be adapted")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(f"target_modules: {name} has hooks, which would be lost. Add LoRA before the hooks")
        if is_within(name, head):
            raise UserError(f"{name} is in both target_modules and modules_to_save (the trained head). Remove it from one")
    return names


def find_head(model: nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the modules that are trained in full: the classification head, and `config.modules_to_save`.

    Raises UserError if an entry of `modules_to_save` matches nothing.
    """
    head = ["classifier", "score"] if config.task_type == "SEQ_CLS" else []
    ends = config.modules_to_save or []
    names = [name for name, _ in model.named_modules() if name]
    for end in ends:
        if not any(name.endswith(end) for name in names) and end not in head:
            raise UserError(f"modules_to_save: no module is named {end!r}. Choose from: {_last_parts(names)}")
    full_names: list[str] = []
    for name in names:
        # as in peft the match may start inside a part of the name: "classifier" also finds "pre_classifier"
        if name.endswith((*ends, *head)) and not is_within(name, full_names):
            full_names.append(name)
    return full_names


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of `names` if they match the same modules, otherwise the full names. Every version of peft reads both."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    matched = [name for name, _ in model.named_modules() if any(_ends_in(name, end) for end in ends)]
    return ends if sorted(matched) == sorted(names) else sorted(names)


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `name`, or `default`."""
    for pattern, value in patterns.items():
        if re.match(pattern_in_name(pattern), name):
            return value
    return default


def is_within(name: str, modules: list[str]) -> bool:
    """Whether `name` is one of `modules` or a part of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _layer_number(name: str) -> int | None:
    """The first number in a name. Like peft, ignore the first two parts and the last."""
    return next((int(part) for part in name.split(".")[2:-1] if part.isdecimal()), None)


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _last_parts(names: list[str]) -> str:
    """The distinct last parts of names, listed for an error message."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join([end for end in ends if not end.isdecimal()][:20])
