"""What to adapt and how, under peft's names: in memory, and as `adapter_config.json`."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from lora.errors import UserError
from lora.files import make_folder, read_json, write_file

HIGHEST_RANK = 1 << 20
LARGEST_ALPHA = 1e30
CONFIG_FILE = "adapter_config.json"
NO_TARGETS = "dummy-target-modules"  # peft's word for an adapter of modules to save alone
# What peft writes and what changes nothing here, whatever it says ...
IGNORED = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "eva_config",
    "megatron_core",
    "qalora_group_size",
}
# ... and the starts of A and B that leave W0 alone, so that a trained adapter no longer depends on them.
HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")
NO_REGEX = (re.error, OverflowError, RecursionError)  # what `re` raises at one that is wrong, too long or too deep


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def pattern_in_name(pattern: str) -> str:
    """The regular expression that matches the names which end in what `pattern` matches."""
    return rf"(.*\.)?({pattern})$"


# What the rest of the code takes for granted; JSON, and a script, can hold anything under these names.
RIGHT: dict[str, Callable[[Any], bool]] = {
    "target_modules": lambda value: value is None or isinstance(value, str) or _is_list(value, str),
    "modules_to_save": lambda value: value is None or _is_list(value, str),
    "layers_to_transform": lambda value: value is None or type(value) is int or _is_list(value, int),
    "rank_pattern": lambda value: isinstance(value, dict),
    "alpha_pattern": lambda value: isinstance(value, dict),
    "use_rslora": lambda value: isinstance(value, bool),
    "use_dora": lambda value: isinstance(value, bool),
    "base_model_name_or_path": lambda value: value is None or isinstance(value, str),
    "revision": lambda value: value is None or isinstance(value, str),
}


class TaskType(str, Enum):
    """peft's name for what a model is for."""

    SEQ_CLS = "SEQ_CLS"


@dataclass
class LoraConfig:
    """The options of LoRA that this library has. Raises UserError for a value that cannot be meant.

    r, lora_alpha: rank and scale, dW = (alpha / r) B A; with `use_rslora`, alpha / sqrt(r) (arXiv:2312.03732).
    target_modules: the linear layers to adapt: a list of the ends of their names (["q_lin", "v_lin"]), a regular expression
        that matches whole names, "all-linear", which is every linear layer outside the head, or NO_TARGETS, which is none.
    layers_to_transform: adapt the layers with these numbers (the first in a module's name) only.
    rank_pattern, alpha_pattern: r or alpha of their own for the layers whose name ends in the key, a regular expression.
    modules_to_save: modules to train in full beside the adapters, by the ends of their names. With task_type "SEQ_CLS" (the
        default here; peft's is None) the head is always among them: what is called "score" or ends in "classifier".
    bias: which biases are trained as well: "none", "all" of the model's, or those of the adapted layers ("lora_only").
    init_lora_weights: A uniform and B zero (True), A normal and B zero ("gaussian"), or B not zero either (False).
    use_dora: train the lengths of W's rows apart from their directions (lora/variants.py).
    base_model_name_or_path, revision: what the adapter was trained on, for whoever loads it.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    task_type: str | None = "SEQ_CLS"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False  # these two for scripts written for peft; True is more than this library has
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, tuple | set):
                setattr(self, item.name, value := sorted(value))
            if item.name in RIGHT and not RIGHT[item.name](value):
                raise UserError(f"{item.name} is {value!r}, which is of the wrong type")
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(pattern_in_name(pattern))
            except NO_REGEX as error:
                raise UserError(f"rank_pattern and alpha_pattern: {pattern!r} is no regular expression: {error}") from error
        for name, r in {"r": self.r, **{f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}}.items():
            if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r < HIGHEST_RANK:
                raise UserError(f"{name} is {r!r}; the rank of an adapter is a whole number from 1, and below 2**20")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{key!r}]": a for key, a in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            if not _is_number(alpha) or not 0 < alpha < LARGEST_ALPHA:
                raise UserError(f"{name} is {alpha!r}; it must be a number above 0, and one that float32 holds")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout!r}; a probability is at least 0 and less than 1")
        for name in ("inference_mode", "fan_in_fan_out"):
            if getattr(self, name) is not False:
                raise UserError(f"{name} is {getattr(self, name)!r}; this library has False only")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f"bias is {self.bias!r}; it can be none, all or lora_only")
        if self.task_type not in (None, "SEQ_CLS"):
            raise UserError(f"task_type is {self.task_type!r}; this library has SEQ_CLS only")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UserError(f"init_lora_weights is {self.init_lora_weights!r}; it can be True, False or 'gaussian'")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LoraConfig":
        """Read an adapter folder's configuration. Raises UserError, by name, for what this library would not obey."""
        path = Path(folder) / CONFIG_FILE
        values = read_json(path)
        if values.get("peft_type") != "LORA":
            raise UserError(f"{path}: peft_type is {values.get('peft_type')!r}; this library reads LORA only")
        if values.get("init_lora_weights", True) in HARMLESS_INIT:
            values["init_lora_weights"] = True
        values.pop("inference_mode", None)  # peft writes True always
        known = {item.name for item in fields(cls)}
        for key, value in values.items():
            if key not in known and key not in IGNORED and value:  # None, False, {} and [] switch an option off
                raise UserError(f"{path}: {key} is {value!r}, which this library does not have; load the adapter with peft")
        values.setdefault("task_type", None)  # peft's default
        saved = values.get("modules_to_save")
        if isinstance(values.get("target_modules"), list) and isinstance(saved, list):
            # for "all-linear" peft lists the head among the targets, and does not adapt it
            values["target_modules"] = [name for name in values["target_modules"] if name not in saved]
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_config.json: the keys that every version of peft knows, sorted."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values = {key: sorted(value) if isinstance(value, list) else value for key, value in values.items()}
        # however A and B started: a trained adapter no longer depends on it
        values |= {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True}
        text = json.dumps(values, indent=2, sort_keys=True)
        write_file(make_folder(folder) / CONFIG_FILE, text.encode() + b"\n")


PeftConfig = LoraConfig  # peft's name for the configuration of any method; LoRA is the one here
