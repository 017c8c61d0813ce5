"""The options of a run: one flat dataclass, and the command line made from it."""

import argparse
import dataclasses
import math
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError, did_you_mean
from lora import NO_TARGETS, LoraConfig

DEFAULT_MODEL, EMBEDDED_MODEL = "distilbert-base-uncased", "minilm"
DEFAULT_DATASET, EMBEDDED_DATASET = "ag_news", "sample"
LEARNING_RATES = {"lora": 5e-4, "full": 5e-5, "head": 2e-3}  # the default of each method
ALL_LINEAR = {"target_modules": ["all-linear"], "r": 8, "learning_rate": 1e-3}  # another shape of LoRA, for compare.py
MIN_EPOCHS, MIN_STEPS = 3, 250  # unless --epochs is typed: three epochs of a small data set are too few steps
LARGEST = 2**31 - 1
ADAPTER_OPTIONS = ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "use_dora")  # what an adapter is made of
LORA_OPTIONS = ("adapter", *ADAPTER_OPTIONS, "lora_dropout", "loraplus_lr_ratio")

GROUPS = {  # of --help: the title of each, by the option that it begins with
    "model": "yours: the model, the data, and where results go",
    "method": "LoRA",
    "head_lr_ratio": "training",
    "dtype": "machine",
}


def option(default: Any, help: str, low: float | None = None, high: float = math.inf, choices: tuple[str, ...] = ()) -> Any:
    """A field. A value outside `low` to `high`, or not among the choices, is refused. None means that it was left out."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass
class Options:
    """Raises UserError for a value that is out of range, and for options that contradict each other."""

    model: str | None = option(
        None, f"hub id, folder or {EMBEDDED_MODEL} [{DEFAULT_MODEL}; {EMBEDDED_MODEL} if the hub cannot be reached]"
    )
    dataset: str | None = option(
        None,
        "a file, a folder with train and test, user/name on the hub, ag_news or sample "
        f"[{DEFAULT_DATASET}; {EMBEDDED_DATASET} if the hub cannot be reached]",
    )
    text_column: tuple[str, ...] = option(
        (), "columns with the text, joined if there are several: names, or numbers from 1 if there is no header [text]"
    )
    label_column: str | None = option(None, "column with the label, likewise [label]")
    test_share: float | None = option(
        None, "share of the rows to put aside, at random by --seed, if there is no test part [0.1]", 0.001, 0.9
    )
    validation_share: float | None = option(
        None, "share of the training rows to put aside, at random by --seed, to choose the best epoch by [0]", 0.001, 0.9
    )
    dataset_revision: str | None = option(None, "commit, branch or tag of the data set on the hub")
    revision: str | None = option(None, "commit, branch or tag of the model on the hub")
    train_limit: int | None = option(
        None, "use only N training examples, drawn at random, each class as often as before", 1, LARGEST
    )
    test_limit: int | None = option(None, "use only N test examples, likewise", 1, LARGEST)
    output_dir: str | None = option(None, "folder for the results, new or empty [a new folder in runs/]")
    merged_output: str | None = option(None, "also write the merged model to this folder, for transformers")
    resume: str | None = option(None, "continue the stopped run in this folder, with the options that it began with")
    method: str = option(
        "lora", "what to train: lora (adapters and head), head (only the head), full (every weight)", choices=(*LEARNING_RATES,)
    )
    adapter: str | None = option(
        None, "start from the adapter in this folder, with its r, alpha and targets, on its base model [from B = 0]"
    )
    r: int = option(2, "rank of the adapters")
    lora_alpha: float = option(16.0, "scale of the adapters: dW = (alpha / r) B A")
    lora_dropout: float = option(0.1, "dropout on the input of the adapters")
    target_modules: tuple[str, ...] = option(
        ("q_lin", "v_lin"), "linear layers to adapt: names, a regular expression, or all-linear"
    )
    bias: str = option("none", "biases to train: none, all, lora_only", choices=("none", "all", "lora_only"))
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = option(False, "train the magnitude and the direction of each row of W separately (DoRA)")
    loraplus_lr_ratio: float = option(1.0, "learning rate of B relative to the rest (LoRA+; 16 is typical)", 1e-6, 1e6)
    head_lr_ratio: float = option(1.0, "learning rate of the head relative to the rest", 1e-6, 1e6)
    epochs: int | None = option(
        None, f"passes over the training examples [{MIN_EPOCHS}, and more if they make less than {MIN_STEPS} steps]", 1, LARGEST
    )
    batch_size: int = option(16, "examples per step", 1, LARGEST)
    learning_rate: float = option(
        None, f"peak learning rate [{', '.join(f'{rate:g} for {name}' for name, rate in LEARNING_RATES.items())}]", 1e-30, 1e30
    )
    weight_decay: float = option(0.01, "weight decay of AdamW", 0, 1e30)
    warmup: float = option(
        0.1, "fraction of the steps in which the learning rate rises from 0; then it falls linearly to 0", 0, 1
    )
    label_smoothing: float = option(0.0, "share of each label that is spread over all classes", 0, 1)
    class_weights: str = option(
        "none", "weight of each class in the loss: none, or balanced (rare ones more)", choices=("none", "balanced")
    )
    patience: int | None = option(
        None, "end after so many looks (of 10) at the validation part that bring no better macro-F1", 1, LARGEST
    )
    max_length: int = option(256, "maximum tokens per text; the rest is cut off", 3, LARGEST)
    seed: int = option(0, "seed of the head, the adapters, the order of the examples, dropout and what is drawn", 0, 2**63 - 1)
    dtype: str = option(
        "auto",
        "arithmetic of the frozen weights: float32, bfloat16, auto (the faster of these two on this machine), or int8",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    device: str = option("auto", "auto (the best available), cpu, cuda, mps", choices=("auto", "cpu", "cuda", "mps"))
    checkpoint_every: int | None = option(
        None, "steps between checkpoints [every 30 s, at most 1 %% of the run time]", 1, LARGEST
    )
    tensorboard: bool = option(False, "also write the metrics for TensorBoard, into the run folder")
    quiet: bool = option(False, "skip the LoRA sanity checks")

    def __post_init__(self) -> None:
        self.target_modules, self.text_column = tuple(self.target_modules), tuple(self.text_column)
        for item in dataclasses.fields(self):
            value, low, high, choices = getattr(self, item.name), *(item.metadata[key] for key in ("low", "high", "choices"))
            if choices and value not in choices:
                remedy = f"Choose from {', '.join(choices)}{did_you_mean(str(value), choices)}"
                raise UserError(f"{flag(item.name)} is {value!r}. {remedy}")
            if None not in (low, value) and not low <= value <= high:
                raise UserError(f"{flag(item.name)} is {value}. It must be between {low:,} and {high:,}")
        if self.label_column in self.text_column:
            raise UserError(f"--text-column and --label-column are both {self.label_column}. Name two columns")
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.method]
        for item in dataclasses.fields(self):
            if self.method != "lora" and item.name in LORA_OPTIONS and getattr(self, item.name) != item.default:
                raise UserError(f"{flag(item.name)} needs --method lora, but --method is {self.method}. Drop one of them")
        if self.method == "full" and self.merged_output is not None:
            raise UserError("--merged-output needs an adapter. --method full writes the whole model into the run folder")
        self.lora_config(self.model or DEFAULT_MODEL, self.revision)  # refuses bad values before anything is loaded

    def lora_config(self, base_model: str, revision: str | None) -> LoraConfig | None:
        """The adapter to train on `base_model`; None with --method full. Raises UserError for a value out of range."""
        if self.method == "full":
            return None
        targets: list[str] | str = list(self.target_modules)
        if len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.]+", targets[0])):
            targets = targets[0]
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=NO_TARGETS if self.method == "head" else targets,
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            base_model_name_or_path=base_model,
            revision=revision,
        )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, but every mistake is a UserError."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> Any:
        hint = ""
        if wrong := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message):
            hint = did_you_mean(wrong[1], self._option_string_actions)
        elif (wrong := re.search("unrecognized arguments: (.*)", message)) and os.path.exists(wrong[1]):
            hint = f". Did you mean --dataset {wrong[1]}?"
        elif wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            hint = did_you_mean(wrong[1], re.findall(r"\w+", wrong[2]))
        raise UserError(f"{message}{hint or '.'} See {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for argument in sys.argv[1:] if args is None else args:
            try:
                argument.encode()
            except UnicodeEncodeError as error:  # a tokenizer cannot read such a text
                raise UserError(f"{argument!r} on the command line is not UTF-8. Type it in UTF-8") from error
        return super().parse_known_args(args, namespace)


def parse(arguments: list[str] | None, description: str | None) -> dict[str, Any]:
    """The options that were typed, by the name of their field in Options. Raises UserError for an unknown option."""
    parser = Parser(description)
    parser.usage = "%(prog)s [options]"  # the list of them all would fill a screen
    group: Any = parser
    for item in dataclasses.fields(Options):
        help, how = item.metadata["help"], dict[str, Any](action="store_true")
        if item.type is not bool:
            kind = next(kind for kind in (int, float, str) if kind in (item.type, *typing.get_args(item.type)))
            several = isinstance(item.default, tuple)
            how = {"type": kind, "nargs": "+" if several else None, "metavar": kind.__name__.upper()}
            default = " ".join(item.default) if several else item.default  # type: ignore[arg-type]
            help += "" if default in (None, "") else f" [{default}]"
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        group.add_argument(flag(item.name), default=argparse.SUPPRESS, help=help, **how)
    return vars(parser.parse_args(arguments))
