"""Which modules a configuration names. Names are matched exactly as peft matches them."""

import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from lora.config import HEADS, NO_TARGETS, LoraConfig
from lora.errors import UserError

# for a model_type, if target_modules is None: as in peft, which has none for distilbert
USUAL_TARGETS = {kind: ["query", "value"] for kind in ("bert", "roberta", "xlm-roberta", "electra")}
USUAL_TARGETS |= {"deberta-v2": ["query_proj", "value_proj"], "distilbert": ["q_lin", "v_lin"]}
END = r"(.*\.)?({})"  # an expression for the end of a name, from its start or a dot on
LAYER = r"(.*?\.)??({})\.(?P<layer>\d+)\..*"  # and for a name with a number somewhere within, as early as possible
MOST_REPEATS = 4  # in a regular expression


def find_targets(model: nn.Module, config: LoraConfig, head: list[str], strict: bool = True) -> list[str]:
    """The full names of the linear layers to adapt, in the model's order. The head is left out.

    Raises UserError if `target_modules`, or (if `strict`) an entry of it, matches nothing, or a module that cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]  # a subclass may compute something else
    kind = getattr(getattr(model, "config", None), "model_type", "")
    wanted = USUAL_TARGETS.get(kind) if config.target_modules is None else config.target_modules
    if wanted == NO_TARGETS:
        return []
    if not wanted:
        raise UserError(f"Please specify `target_modules`, which is empty. Choose from: {_last_parts(linear)}")
    if wanted == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name in linear if modules[name] is not output]
    else:
        names = _named(modules, wanted, "target_modules")
    if not (names := _in_layers(names, wanted, config)):
        where = "" if config.layers_to_transform is None else f". layers_to_transform is {config.layers_to_transform}"
        raise UserError(f"Target modules {wanted!r} not found in the base model{where}. Choose from: {_last_parts(linear)}")
    if strict and isinstance(wanted, list) and (unknown := set(wanted).difference(*map(_ends, modules))):
        raise UserError(f"target_modules: no layer is named {min(unknown)!r}. Choose from: {_last_parts(linear)}")
    excluded = _named(names, config.exclude_modules or [], "exclude_modules")
    if strict and config.exclude_modules and not excluded:
        warnings.warn(f"You have passed exclude_modules={config.exclude_modules!r}, but no modules were excluded", stacklevel=2)
    names = [name for name in names if name not in excluded and not is_within(name, head)]
    if not names:
        raise UserError("All modules were excluded, or are part of modules_to_save (the trained head). Choose others")
    for name in names:
        module, parent = modules[name], modules.get(name.rpartition(".")[0], model)
        if type(module) is not nn.Linear:
            raise UserError(f"target_modules: {name} is of type {type(module).__name__}. Only plain linear layers are adapted")
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(f"target_modules: {name} has hooks, which would be lost. Add LoRA before the hooks")
        if isinstance(parent, nn.TransformerEncoderLayer):
            reason = "in evaluation nn.TransformerEncoderLayer reads its weight, and would ignore LoRA"
            raise UserError(f"target_modules: {name} cannot be adapted: {reason}. Name it in exclude_modules")
    return names


def check_target_module_exists(config: LoraConfig, key: str) -> bool:
    """Whether `config` names the module `key` as a target, in a layer to transform, and does not exclude it."""
    wanted = config.target_modules or []
    names = _in_layers(_named([key], wanted, "target_modules"), wanted, config)
    return bool(names) and not _named(names, config.exclude_modules or [], "exclude_modules")


def find_head(model: nn.Module, config: LoraConfig, strict: bool = True) -> list[str]:
    """The full names of the modules that are trained in full: the head, and `config.modules_to_save`.

    Raises UserError if an entry of `modules_to_save` matches a mere list of modules, or (if `strict`) nothing.
    """
    head = HEADS.get(config.task_type or "", [])
    ends, names = config.modules_to_save or [], [name for name, _ in model.named_modules() if name]
    for end in ends:
        if strict and end not in head and not any(name.endswith(end) for name in names):
            raise UserError(f"modules_to_save: no module is named {end!r}. Choose from: {_last_parts(names)}")
    full_names: list[str] = []
    for name in names:
        # as in peft the match may start inside a part of the name: "classifier" also finds "pre_classifier"
        if name.endswith((*ends, *head)) and not is_within(name, full_names):
            kind = type(model.get_submodule(name))
            if kind.forward is nn.Module.forward:
                raise UserError(f"modules_to_save: {name} is a {kind.__name__}, which computes nothing. Name its modules")
            full_names.append(name)
    return full_names


def find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """The shortest ends of names that match each of the first names and none of the others."""
    if isinstance(target_modules, str) or not target_modules:
        raise UserError(f"target_modules should be a list or set of strings. It is {target_modules!r}")
    if "" in target_modules:
        raise UserError("target_modules should not contain an empty string")
    others = {end for name in other_module_names for end in _ends(name)}
    return {next((end for end in reversed(_ends(name)) if end not in others), name) for name in target_modules}


def pattern_values(option: str, patterns: dict, names: list[str], default: Any, strict: bool = True) -> dict[str, Any]:
    """For each name the value of the first pattern that matches its end, or `default`. Raises UserError as `find_targets`."""
    values: dict[str, Any] = {}
    for pattern, value in patterns.items():
        found = _match(option, pattern, names, END)
        if strict and not found:
            raise UserError(f"{option}: no target module is named {pattern!r}. Choose from: {_last_parts(names)}")
        values = dict.fromkeys(found, value) | values  # the first match wins
    return dict.fromkeys(names, default) | values


def is_within(name: str, modules: list[str]) -> bool:
    """Whether `name` is one of `modules` or a part of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _in_layers(names: list[str], wanted: list[str] | str, config: LoraConfig) -> list[str]:
    """The names in `layers_to_transform`, and those that are entries of `wanted` in full, which always count.

    A name's layer is the first number after a match of the first of `layers_pattern` that is there, by default after any two
    parts. As in peft, the last part is never a layer.
    """
    chosen, patterns = config.layers_to_transform, config.layers_pattern or [r"[^.]*\.[^.]*"]
    if chosen is None or chosen == []:
        return names
    layers: dict[str, int] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = _match("layers_pattern", pattern, names, LAYER)
        layers = {name: int(match["layer"]) for name, match in found.items()} | layers
    numbers = [chosen] if isinstance(chosen, int) else chosen
    return [name for name in names if layers.get(name) in numbers or (isinstance(wanted, list) and name in wanted)]


def _named(names: Iterable[str], wanted: list[str] | str, option: str) -> list[str]:
    """The names that `wanted` matches, a regular expression, or that end in an entry of it, a list."""
    if isinstance(wanted, str):
        return list(_match(option, wanted, names))
    ends = set(wanted)
    return [name for name in names if not ends.isdisjoint(_ends(name))]


def _ends(name: str) -> list[str]:
    """A name, and what follows each of its dots."""
    return [name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))]


def _match(option: str, pattern: str, names: Iterable[str], within: str = "{}") -> dict[str, re.Match]:
    """The names that `pattern`, put into `within`, matches as a whole. Raises UserError if it is invalid or could take long.

    `re` may never end over a pattern such as `([a-z]+)+!`, and files come from strangers.
    """
    if len(re.findall(r"[*+{]", pattern)) > MOST_REPEATS or re.search(r"\)[*+{]", pattern):
        remedy = f"Write at most {MOST_REPEATS} of * + {{, and none behind a group"
        raise UserError(f"{option}: {pattern!r:.99} takes too long to match. {remedy}")
    try:
        expression = re.compile(within.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:  # invalid, too long or too deep
        raise UserError(f"{option}: {pattern!r:.99} is not a valid regular expression: {error}") from error
    return {name: match for name in names if (match := expression.fullmatch(name))}


def _last_parts(names: list[str]) -> str:
    """The distinct last parts of names, listed for an error message."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join([end for end in ends if not end.isdecimal()][:20])
