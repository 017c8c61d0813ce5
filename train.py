"""Fine-tune DistilBERT on AG News with LoRA: the whole experiment, from top to bottom.

python train.py                                          distilbert-base-uncased on ag_news, r = 2 on q_lin and v_lin
python train.py --model minilm --dataset sample          the same on the embedded encoder and corpus, without a network
python train.py --dataset my/folder                      your own train and test, as .jsonl or .csv (see data/datasets.py)
python train.py --help                                   every option
"""

import argparse
import dataclasses
import io
import json
import math
import re
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import TokenizedTexts, load_dataset, tokenize, training_batches
from errors import UserError
from evaluate import Forward, confusion_matrix, f1_per_class, macro_f1, predict, progress, scores
from files import HubUnreachable, refuse_to_overwrite, write_file
from lora import LoraConfig, get_peft_model
from machine import choose_device, choose_dtype, halve_frozen_weights, peak_memory_mb
from model import load_pretrained

DEFAULT_MODEL, EMBEDDED_MODEL = "distilbert-base-uncased", "minilm"
DEFAULT_DATASET, EMBEDDED_DATASET = "ag_news", "sample"
LOG_EVERY = 10  # steps


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
    train_limit: int | None = option(None, "train on the first so many examples only")
    test_limit: int | None = option(None, "test on the first so many examples only")
    r: int = option(2, "rank of the adapters")
    lora_alpha: float = option(16.0, "scale of the adapters: dW = (alpha / r) B A")
    lora_dropout: float = option(0.1, "dropout on the input of the adapters")
    target_modules: tuple[str, ...] = option(
        ("q_lin", "v_lin"), "linear layers to adapt: names, a regular expression, or all-linear"
    )
    bias: str = option("none", "biases to train: none, all, lora_only")
    epochs: int = option(3, "passes over the training examples")
    batch_size: int = option(32, "examples a step")
    learning_rate: float = option(1e-3, "highest learning rate of AdamW")
    weight_decay: float = option(0.01, "weight decay of AdamW")
    warmup: float = option(0.1, "share of the steps in which the learning rate rises; then it falls to 0, both linearly")
    max_length: int = option(256, "tokens of a text that are read")
    seed: int = option(0, "of the head, the adapters, the order of examples and dropout")
    output_dir: str | None = option(None, "folder for the results, new or empty [runs/ and a name of its own]")
    dtype: str = option("auto", "of the frozen weights and the arithmetic: auto (bfloat16 where it is fast), float32, bfloat16")
    device: str = option("auto", "auto (the best there is), cpu, cuda, mps")

    def __post_init__(self) -> None:
        for name, least in [
            ("train_limit", 1),
            ("test_limit", 1),
            ("epochs", 1),
            ("batch_size", 1),
            ("max_length", 3),
            ("seed", 0),
        ]:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{flag(name)} is {value}; it must be {least} at least")
        if self.seed >= 1 << 63:
            raise UserError(f"--seed is {self.seed}; it must be below 2**63")
        if not 0 < self.learning_rate < 1e30:
            raise UserError(f"--learning-rate is {self.learning_rate}; it must be above 0, and a number that float32 holds")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay is {self.weight_decay}; it must be a number from 0")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--warmup is {self.warmup}; it is a share of the steps, from 0 to 1")
        for name, values in [("dtype", ("auto", "float32", "bfloat16")), ("device", ("auto", "cpu", "cuda", "mps"))]:
            if getattr(self, name) not in values:
                raise UserError(f"{flag(name)} is {getattr(self, name)!r}; it can be {', '.join(values)}")

    def lora_config(self) -> LoraConfig:
        targets: list[str] | str = list(self.target_modules)
        if len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.]+", targets[0])):
            targets = targets[0]
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            bias=self.bias,
        )


def run(options: Options) -> dict[str, Any]:
    """The experiment. Returns what it writes into results.json."""
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = options.lora_config()
    output_dir = Path(f"runs/{datetime.now():%Y-%m-%d-%H%M%S}" if options.output_dir is None else options.output_dir)
    refuse_to_overwrite(output_dir)

    # Data and model: what was asked for, or, where nothing was and there is no hub, what is embedded.
    dataset, dataset_name, notice = load_or_step_in(load_dataset, options.dataset, DEFAULT_DATASET, EMBEDDED_DATASET)
    torch.manual_seed(options.seed)  # the head starts at random
    (base, tokenizer), model_name, model_notice = load_or_step_in(
        lambda name: load_pretrained(name, len(dataset.label_names)), options.model, DEFAULT_MODEL, EMBEDDED_MODEL
    )
    notice = "\n".join(filter(None, [model_notice, notice]))
    if notice:
        print(notice)
    if options.max_length > base.config.max_position_embeddings:
        raise UserError(
            f"--max-length is {options.max_length}, and {model_name} reads {base.config.max_position_embeddings} tokens"
        )
    if options.r > base.config.dim:
        raise UserError(f"--r is {options.r}, and no layer of {model_name} has a rank above {base.config.dim}")
    train_split, test_split = dataset.train.first(options.train_limit), dataset.test.first(options.test_limit)
    train_texts = tokenize(tokenizer, train_split.texts, options.max_length)
    test_texts = tokenize(tokenizer, test_split.texts, options.max_length)
    print(f"model {model_name}, data {dataset_name}: {len(train_split):,} examples to train on, {len(test_split):,} to test on")

    # LoRA: everything is frozen but the adapters and the head.
    model = get_peft_model(base, config).to(device)
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    halve_frozen_weights(model, dtype)
    forward = Forward(model, device, dtype)

    # Evaluate, train, evaluate.
    make_folder(output_dir)
    names = dataset.label_names
    before = confusion_matrix(test_split.labels, predict(forward, test_texts, "before"), len(names))
    print(f"macro-F1 before training: {macro_f1(before):.4f}")
    trained = train(forward, train_texts, train_split.labels, options, output_dir / "metrics.jsonl")
    after = confusion_matrix(test_split.labels, predict(forward, test_texts, "after"), len(names))
    print(f"macro-F1 after training:  {macro_f1(after):.4f}")
    for name, f1 in zip(names, f1_per_class(after), strict=True):
        print(f"  F1 of {name:<20} {f1:.4f}")

    # Keep the result.
    save_trained(model, output_dir / "trained.safetensors")
    results = {
        "model": model_name,
        "dataset": dataset_name,
        "embedded": bool(notice),
        "seed": options.seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "options": dataclasses.asdict(options),
        "parameters": {"trainable": trainable, "all": total, "percent": round(100 * trainable / total, 4)},
        "before": scores(before, names),
        "after": scores(after, names),
        "train": trained | {"peak_memory_mb": peak_memory_mb(device)},
    }
    write_file(output_dir / "results.json", json.dumps(results, indent=2).encode() + b"\n")
    print(f"results in {output_dir}")
    if notice:
        print(notice)
    return results


def load_or_step_in(load: Callable[[str], Any], asked: str | None, default: str, embedded: str) -> tuple[Any, str, str]:
    """(what was loaded, its name, a notice if the embedded one stepped in). A name that was typed is obeyed or refused."""
    try:
        name = default if asked is None else asked
        return load(name), name, ""
    except HubUnreachable:
        if asked is not None:
            raise
    notice = f"{default} is not on this machine and the hub cannot be reached: the embedded {embedded} steps in"
    return load(embedded), embedded, notice


def train(forward: Forward, texts: TokenizedTexts, labels: np.ndarray, options: Options, log: Path) -> dict[str, Any]:
    """The loop: AdamW on what is trainable, one line of metrics every LOG_EVERY steps. Returns what it measured."""
    parameters = [parameter for parameter in forward.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    examples = options.epochs * len(labels)
    steps = options.epochs * math.ceil(len(labels) / options.batch_size)
    step, losses, done = 0, [], 0
    forward.model.train()
    start = time.perf_counter()
    with open(log, "w") as metrics, progress(examples, "train") as bar:
        for epoch in range(options.epochs):
            for batch in training_batches(texts.lengths, options.batch_size, options.seed, epoch):
                step += 1
                learning_rate = options.learning_rate * schedule(step, steps, options.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate

                logits = forward(texts, batch)
                loss = F.cross_entropy(logits, torch.from_numpy(labels[batch]).to(logits.device))
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()

                losses.append(loss.detach())
                done += len(batch)
                bar.update(len(batch))
                if step % LOG_EVERY == 0 or step == steps:
                    mean = torch.stack(losses).mean().item()
                    losses = []
                    if not math.isfinite(mean):
                        raise UserError(f"the loss is {mean} at step {step}: try a smaller --learning-rate, or --dtype float32")
                    seconds = time.perf_counter() - start
                    bar.set_postfix(loss=f"{mean:.3f}")
                    line = {
                        "step": step,
                        "epoch": epoch,
                        "loss": mean,
                        "learning_rate": learning_rate,
                        "gradient_norm": norm.item(),
                        "examples_per_second": done / seconds,
                    }
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                    if step == LOG_EVERY:
                        warn_of_a_long_run(bar, seconds / done, examples)
    seconds = time.perf_counter() - start
    return {
        "examples": examples,
        "steps": steps,
        "seconds": round(seconds, 3),
        "examples_per_second": round(examples / seconds, 3),
    }


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate at `step` of 1..steps: up to 1 in warmup * steps, then down towards 0."""
    rising = max(1.0, warmup * steps)
    return min(step / rising, (steps - step + 1) / (steps - rising + 1))


def warn_of_a_long_run(bar: tqdm, seconds_per_example: float, examples: int) -> None:
    minutes = seconds_per_example * examples / 60
    if minutes > 15:
        limit = int(examples * 10 / minutes / 1000) * 1000 or 500
        bar.write(f"training will take about {minutes:,.0f} minutes here; --train-limit {limit} with --epochs 1 takes about 10")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made: {error.strerror}") from error


def save_trained(model: nn.Module, path: Path) -> None:
    tensors = {name: tensor.detach().cpu() for name, tensor in model.named_parameters() if tensor.requires_grad}
    safetensors.torch.save_file(tensors, path)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(arguments: list[str] | None = None) -> Options:
    """The command line made from Options: each field is a flag."""
    assert __doc__ is not None
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for item in dataclasses.fields(Options):
        several = isinstance(item.default, tuple)
        kind = next(kind for kind in (int, float, str) if kind in (item.type, *typing.get_args(item.type)))
        shown = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        parser.add_argument(
            flag(item.name),
            type=kind,
            nargs="+" if several else None,
            default=item.default,
            metavar=kind.__name__.upper(),
            help=item.metadata["help"] + ("" if shown is None else f" [{shown}]"),
        )
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rather than fail at a class name that the console cannot show
    try:
        run(parse(arguments))
        return 0
    except UserError as error:
        print("train.py:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
