"""LoraConfig: what to adapt and how, under peft's names, in memory and as `adapter_config.json`."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from lora.errors import UserError
from lora.files import find_folder, make_folder, read_json, write_file

CONFIG_FILE = "adapter_config.json"
MAX_ENTRIES = 10_000  # in a list or a dictionary
RANGES = {"r": (1, 1e6), "lora_alpha": (1e-30, 1e30), "lora_dropout": (0, 1)}  # float32 ends at 3.4e38
NO_TARGETS = "dummy-target-modules"  # peft's word for an adapter that only trains modules_to_save

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
TaskType = Enum("TaskType", [(task, task) for task in TASKS], type=str)  # type: ignore[misc]
CHOICES: dict[str, tuple] = {
    "bias": ("none", "all", "lora_only"),
    "task_type": (*TASKS, None),
    "init_lora_weights": (True, False, "gaussian"),
    "fan_in_fan_out": (False,),
    "peft_type": ("LORA",),
}
# the ends of the names of a task's head, which is trained in full
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
# keys in peft's files that have no effect on how the adapter computes
IGNORED = {"peft_version", "eva_config", "megatron_core", "qalora_group_size"}
NEWER = {"exclude_modules", "layers_pattern", "auto_mapping"}  # written only if they are set
# initialisations that leave W0 as it is: once trained, an adapter no longer depends on them
HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


@dataclass
class LoraConfig:
    """The options of LoRA, a subset of peft's. Raises UserError, by name, for a value of the wrong type or out of range.

    r, lora_alpha: rank and scale, dW = (alpha / r) B A (arXiv:2106.09685, section 4.1).
    lora_dropout: probability of dropout on the input of A.
    target_modules: the linear layers to adapt: names or ends of names (["q_lin", "v_lin"]); a regular expression for full
        names; "all-linear" for all of them outside the head; NO_TARGETS for none; None for the usual ones of this model.
    exclude_modules: targets to leave out, named in the same way.
    modules_to_save: modules to train in full beside the adapters, by the ends of their names. With task_type "SEQ_CLS" (the
        default here; peft's is None) also the head: names that end in "classifier" or "score".
    bias: the biases to train: "none", "all", or only those of the adapted layers ("lora_only").
    use_rslora, use_dora: scale by alpha / sqrt(r) instead (lora/layer.py); train the lengths of W's rows (lora/variants.py).
    init_lora_weights: A uniform and B zero (True), A normal and B zero ("gaussian"), or neither of them zero (False).
    layers_to_transform: adapt only these layers, by number: the first in a name, or after a match of `layers_pattern`.
    rank_pattern, alpha_pattern: r or alpha for the layers whose name ends in the key, a regular expression.
    base_model_name_or_path, revision: the model that the adapter was trained on.
    inference_mode: freeze the adapter too, as in a saved file.
    peft_type, fan_in_fan_out, auto_mapping: keys of peft's files. The first two have one value here; a model sets the last.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    task_type: str | None = "SEQ_CLS"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    fan_in_fan_out: bool = False
    peft_type: str = "LORA"
    auto_mapping: dict[str, str] | None = None

    def __post_init__(self) -> None:
        annotations = typing.get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list | tuple | set | dict) and len(value) > MAX_ENTRIES:
                raise UserError(f"{item.name} has {len(value):,} entries. Supported: {MAX_ENTRIES:,}")
            if isinstance(value, tuple | set):
                setattr(self, item.name, value := sorted(value))
            if not _has_type(value, annotations[item.name]):
                raise UserError(f"{item.name} is {value!r}. Its type must be {item.type}")
            if value not in CHOICES.get(item.name, (value,)):
                raise UserError(f"{item.name} is {value!r}. Supported: {', '.join(map(str, CHOICES[item.name]))}")
        if self.layers_pattern and self.layers_to_transform in (None, []):
            raise UserError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. Give both")
        numbers = [(name, getattr(self, name), *limits) for name, limits in RANGES.items()]
        numbers += [(f"rank_pattern[{name!r}]", rank, *RANGES["r"]) for name, rank in self.rank_pattern.items()]
        numbers += [(f"alpha_pattern[{name!r}]", alpha, *RANGES["lora_alpha"]) for name, alpha in self.alpha_pattern.items()]
        for name, value, low, high in numbers:
            if not low <= value < high:
                raise UserError(f"{name} is {value}. It must be at least {low:g} and below {high:g}")

    to_dict = asdict

    @staticmethod
    def from_json_file(path_json_file: str | Path) -> dict[str, Any]:
        return read_json(Path(path_json_file))

    @classmethod
    def from_pretrained(cls, model_id: str | Path, **hub: Any) -> LoraConfig:
        """Read the configuration of an adapter (`files.find_folder`). Raises UserError, by name, for an unsupported option."""
        path = find_folder(model_id, hub, (CONFIG_FILE,)) / CONFIG_FILE
        values = {"peft_type": None, "task_type": None} | read_json(path)  # peft's defaults
        if values.get("init_lora_weights", True) in HARMLESS_INIT:
            values["init_lora_weights"] = True
        known = {item.name for item in fields(cls)}
        for key, value in values.items():
            if key not in known and key not in IGNORED and value:  # None, False, {} and [] mean that an option is off
                raise UserError(f"{path}: {key} is {value!r}, an option that is not supported here. Load the adapter with peft")
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter_config.json, with sorted keys that every version of peft knows. Raises UserError if it cannot."""
        values = {key: sorted(value) if isinstance(value, list) else value for key, value in self.to_dict().items()
                  if key not in NEWER or value}  # fmt: skip
        values["init_lora_weights"] = True  # a trained adapter no longer depends on how A and B started
        text = json.dumps(values, indent=2, sort_keys=True)
        write_file(make_folder(folder) / CONFIG_FILE, text.encode() + b"\n")


PeftConfig = LoraConfig  # peft's class for all of its methods; here there is one


def _has_type(value: Any, annotation: Any) -> bool:
    """Whether `value`, which a script or a file of JSON may set to anything, has the type that is written in LoraConfig."""
    kind, of = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (types.UnionType, typing.Union):
        return any(_has_type(value, option) for option in of)
    if isinstance(value, bool) or kind is bool:  # Python counts True as an int
        return isinstance(value, bool) and kind is bool
    parts = [value, value.values()] if kind is dict and isinstance(value, dict) else [value]
    fits = isinstance(value, int | float if kind is float else kind)
    return fits and all(_has_type(item, each) for part, each in zip(parts, of, strict=False) for item in part)
