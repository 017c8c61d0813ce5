"""Which modules a configuration means, matched as peft matches them."""

import re
from typing import Any

from torch import nn

from lora.config import NO_REGEX, NO_TARGETS, LoraConfig, pattern_in_name
from lora.errors import UserError


def find_targets(model: nn.Module, config: LoraConfig, head: list[str]) -> list[str]:
    """The full names of the linear layers that `config.target_modules` means, in the model's order.

    Raises UserError if it, or an entry of it, means none, something that is no linear layer, or a part of the head.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]  # a subclass may do something else
    wanted = config.target_modules
    if wanted == NO_TARGETS:
        return []
    if not wanted:
        raise UserError(f"target_modules is empty; it can name any of: {_ends(linear)}")
    if wanted == "all-linear":
        found = [name for name in linear if not is_within(name, head)]
    elif isinstance(wanted, str):
        try:
            found = [name for name in modules if re.fullmatch(wanted, name)]
        except NO_REGEX as error:
            raise UserError(f"target_modules is {wanted!r}, which is no regular expression: {error}") from error
    else:
        for end in wanted:
            if not any(_ends_in(name, end) for name in modules):
                raise UserError(f"target_modules: no layer is called {end!r}; there are: {_ends(linear)}")
        found = [name for name in modules if any(_ends_in(name, end) for end in wanted)]
    if config.layers_to_transform not in (None, []):
        chosen = config.layers_to_transform
        numbers = [chosen] if isinstance(chosen, int) else chosen
        whole = [] if isinstance(wanted, str) else wanted  # a whole name means itself
        found = [name for name in found if name in whole or _layer_number(name) in numbers]
        if not found:
            raise UserError(f"layers_to_transform is {chosen!r}, and none of those layers has a target")
    if not found:
        raise UserError(f"target_modules is {wanted!r}, which matches no layer; there are: {_ends(linear)}")
    for name in found:
        module = modules[name]
        if name not in linear:
            kind = type(module).__name__
            raise UserError(f"target_modules: {name} is of type {kind}; only plain linear layers are adapted")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(f"target_modules: {name} has hooks, which would be lost: put LoRA in first")
        if is_within(name, head):
            raise UserError(f"target_modules: {name} is trained in full already (modules_to_save): leave it out of one of them")
    return found


def short_names(model: nn.Module, targets: list[str]) -> list[str]:
    """The ends of the targets' names if these mean the same layers, or the whole names: what any version of peft reads."""
    ends = sorted({name.rpartition(".")[2] for name in targets})
    meant = [name for name, _ in model.named_modules() if any(_ends_in(name, end) for end in ends)]
    return ends if sorted(meant) == sorted(targets) else sorted(targets)


def find_head(model: nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the modules that are trained in full: the head, and what `config.modules_to_save` adds.

    Raises UserError if an entry of that means none.
    """
    head = ["classifier", "score"] if config.task_type == "SEQ_CLS" else []
    ends = config.modules_to_save or []
    names = [name for name, _ in model.named_modules() if name]
    for end in ends:
        if not any(name.endswith(end) for name in names) and end not in head:
            raise UserError(f"modules_to_save: no module is called {end!r}; there are: {_ends(names)}")
    found: list[str] = []
    for name in names:
        if name.endswith((*ends, *head)) and not is_within(name, found):  # not at a dot only: so peft finds pre_classifier
            found.append(name)
    return found


def pattern_value(patterns: dict[str, Any], name: str, usual: Any) -> Any:
    """The value of the first pattern that the end of `name` matches, or the usual one."""
    for pattern, value in patterns.items():
        if re.match(pattern_in_name(pattern), name):
            return value
    return usual


def _layer_number(name: str) -> int | None:
    """The first number in a name, where peft looks for it: behind two components at least, and not at the end."""
    return next((int(part) for part in name.split(".")[2:-1] if part.isdecimal()), None)


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def is_within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _ends(names: list[str]) -> str:
    """The distinct last components of names, for a message."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join([end for end in ends if not end.isdecimal()][:20])
