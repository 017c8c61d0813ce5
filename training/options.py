"""The options of a run: one flat dataclass, and the command line made from it."""

import argparse
import dataclasses
import math
import re
import sys
import typing
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError
from lora import NO_TARGETS, LoraConfig

DEFAULT_MODEL, EMBEDDED_MODEL = "distilbert-base-uncased", "minilm"
DEFAULT_DATASET, EMBEDDED_DATASET = "ag_news", "sample"
LEARNING_RATES = {"lora": 5e-4, "full": 5e-5, "head": 2e-3}  # of each method
OF_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora", "loraplus_lr_ratio")


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    model: str | None = option(
        None, f"a hub id, a folder, or {EMBEDDED_MODEL} [{DEFAULT_MODEL}; {EMBEDDED_MODEL} if the hub cannot be reached]"
    )
    dataset: str | None = option(
        None, f"ag_news, sample, or a folder [{DEFAULT_DATASET}; {EMBEDDED_DATASET} if the hub cannot be reached]"
    )
    revision: str | None = option(None, "commit, branch or tag of the model on the hub")
    train_limit: int | None = option(None, "train on the first so many examples only")
    test_limit: int | None = option(None, "test on the first so many examples only")
    method: str = option("lora", "what is trained: lora (adapters and head), head (that alone) or full (every weight)")
    r: int = option(2, "rank of the adapters")
    lora_alpha: float = option(16.0, "scale of the adapters: dW = (alpha / r) B A")
    lora_dropout: float = option(0.1, "dropout on the input of the adapters")
    target_modules: tuple[str, ...] = option(
        ("q_lin", "v_lin"), "linear layers to adapt: names, a regular expression, or all-linear"
    )
    bias: str = option("none", "biases to train: none, all, lora_only")
    use_rslora: bool = option(False, "scale by alpha / sqrt(r) (rsLoRA)")
    use_dora: bool = option(False, "train the lengths of W's rows apart from their directions (DoRA)")
    loraplus_lr_ratio: float = option(1.0, "let B learn so many times as fast as the rest (LoRA+; 16 is usual)")
    epochs: int = option(3, "passes over the training examples")
    batch_size: int = option(16, "examples a step")
    learning_rate: float = option(
        None, f"highest learning rate of AdamW [{', '.join(f'{rate:g} for {name}' for name, rate in LEARNING_RATES.items())}]"
    )
    weight_decay: float = option(0.01, "weight decay of AdamW")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises; then it falls to 0, both linearly")
    max_length: int = option(256, "tokens of a text that are read")
    seed: int = option(0, "of the head, the adapters, the order of examples and dropout")
    resume: str | None = option(None, "go on with the run in this folder, which was stopped; its options are taken from there")
    checkpoint_every: int | None = option(
        None, "steps from one checkpoint to the next [every 30 seconds, or rarer: they take a hundredth of the time at most]"
    )
    output_dir: str | None = option(None, "folder for the results, new or empty [runs/ and a name of its own]")
    merged_output: str | None = option(None, "folder for the merged model as well, as transformers loads it")
    tensorboard: bool = option(False, "write metrics for TensorBoard, too, into the run's folder")
    quiet: bool = option(False, "leave out the identities of LoRA, which a run checks on its model at the start")
    dtype: str = option("auto", "of the frozen weights and the arithmetic: auto (bfloat16 where it is fast), float32, bfloat16")
    device: str = option("auto", "auto (the best there is), cpu, cuda, mps")

    def __post_init__(self) -> None:
        self.target_modules = tuple(self.target_modules)
        if self.method not in LEARNING_RATES:
            raise UserError(f"--method is {self.method!r}; it can be {', '.join(LEARNING_RATES)}")
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.method]
        if self.method != "lora":
            for item in dataclasses.fields(self):
                if item.name in OF_LORA and getattr(self, item.name) != item.default:
                    raise UserError(f"{flag(item.name)} is for LoRA, and --method is {self.method}: leave out one of them")
        if self.method == "full" and self.merged_output is not None:
            raise UserError("--merged-output is for adapters; --method full writes the whole model into the run's folder")
        for name, least in [
            ("train_limit", 1),
            ("test_limit", 1),
            ("epochs", 1),
            ("batch_size", 1),
            ("max_length", 3),
            ("checkpoint_every", 1),
            ("seed", 0),
        ]:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{flag(name)} is {value}; it must be {least} at least")
            if value is not None and value >= 1 << 31 and name != "seed":
                raise UserError(f"{flag(name)} is {value}; it must be below 2**31")
        if self.seed >= 1 << 63:
            raise UserError(f"--seed is {self.seed}; it must be below 2**63")
        if not 0 < self.learning_rate < 1e30:
            raise UserError(f"--learning-rate is {self.learning_rate}; it must be above 0, and a number that float32 holds")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay is {self.weight_decay}; it must be a number from 0")
        if not 0 < self.loraplus_lr_ratio < 1e6:
            raise UserError(f"--loraplus-lr-ratio is {self.loraplus_lr_ratio}; it must be above 0 and below a million")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--warmup is {self.warmup}; it is a share of the steps, from 0 to 1")
        for name, values in [("dtype", ("auto", "float32", "bfloat16")), ("device", ("auto", "cpu", "cuda", "mps"))]:
            if getattr(self, name) not in values:
                raise UserError(f"{flag(name)} is {getattr(self, name)!r}; it can be {', '.join(values)}")

    def lora_config(self) -> LoraConfig:
        """What is trained: adapters and head, or the head alone. (With --method full there is none.)"""
        targets: list[str] | str = list(self.target_modules)
        if len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.]+", targets[0])):
            targets = targets[0]
        if self.method == "head":
            targets = NO_TARGETS
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            bias=self.bias,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            revision=self.revision,
        )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for argument in sys.argv[1:] if args is None else args:
            try:
                argument.encode()
            except UnicodeEncodeError as error:  # no tokenizer reads such a text, and none is read from such a file
                raise UserError(f"{argument!r} on the command line is not UTF-8: write, or name, it so") from error
        return super().parse_known_args(args, namespace)


def parse(arguments: list[str] | None, description: str | None) -> dict[str, Any]:
    """The options that were typed, each a field of Options. Raises UserError for what is none."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for item in dataclasses.fields(Options):
        if item.type is bool:
            parser.add_argument(flag(item.name), action="store_true", default=argparse.SUPPRESS, help=item.metadata["help"])
            continue
        several = isinstance(item.default, tuple)
        kind = next(kind for kind in (int, float, str) if kind in (item.type, *typing.get_args(item.type)))
        shown = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        parser.add_argument(
            flag(item.name),
            type=kind,
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=item.metadata["help"] + ("" if shown is None else f" [{shown}]"),
        )
    return vars(parser.parse_args(arguments))
