"""Fine-tune DistilBERT on AG News with LoRA: the whole experiment, from top to bottom.

python train.py                                          distilbert-base-uncased on ag_news, r = 2 on q_lin and v_lin
python train.py --model minilm --dataset sample          the same on the embedded encoder and corpus, without a network
python train.py --dataset my/folder                      your own train and test, as .jsonl or .csv (see data/datasets.py)
python train.py --help                                   every option

torchrun --nproc-per-node 4 train.py                     on the four GPUs of one machine, or with four processes on its cores
torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --master-addr HOST --master-port 29500 train.py
                                                         on two machines; on the second, with --node-rank 1
"""

import dataclasses
import functools
import io
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from data import TokenizedTexts, evaluation_batches, load_dataset, micro_batches, tokenize, training_batches
from errors import UserError, exit_status
from evaluate import Forward, evaluate, f1_per_class, macro_f1, progress, scores
from files import HubUnreachable, new_folder, refuse_to_overwrite, write_file
from lora import PeftModel, get_peft_model
from machine import cast_frozen_matrices, choose_device, choose_dtype, peak_memory_mb
from model import DistilBertForSequenceClassification, load_pretrained, save_pretrained
from optimizer import AdamW
from options import DEFAULT_DATASET, DEFAULT_MODEL, EMBEDDED_DATASET, EMBEDDED_MODEL, Options, flag, parse
from processes import Processes

LOG_EVERY = 10  # steps
RUN_FILES = ("metrics.jsonl", "results.json", "adapter")  # of a run's folder


def run(options: Options) -> dict[str, Any]:
    """The experiment. Returns what it writes into results.json."""
    processes = Processes()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = options.lora_config()
    output_dir = Path(f"runs/{datetime.now():%Y-%m-%d-%H%M%S}" if options.output_dir is None else options.output_dir)
    if processes.first:
        check_folders(output_dir, options.merged_output)
    processes.join(device)

    # Data and model: what was asked for, or, where nothing was and there is no hub, what is embedded.
    dataset, dataset_name, data_notice = load_or_step_in(load_dataset, options.dataset, DEFAULT_DATASET, EMBEDDED_DATASET)
    names = dataset.label_names
    asked = DEFAULT_MODEL if options.model is None and options.revision is not None else options.model

    def load_base(name: str) -> tuple[DistilBertForSequenceClassification, Tokenizer]:
        return load_pretrained(name, len(names), options.revision)

    torch.manual_seed(options.seed)  # the head starts at random
    (base, tokenizer), model_name, model_notice = load_or_step_in(load_base, asked, DEFAULT_MODEL, EMBEDDED_MODEL)
    notice = "\n".join(filter(None, [model_notice, data_notice]))
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
    config = dataclasses.replace(config, base_model_name_or_path=model_name)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    processes.agree(lambda: fingerprint(options, dtype, model, [train_texts.ids, train_split.labels, test_texts.ids]))
    cast_frozen_matrices(model.to(device), dtype)
    forward = Forward(model, device, dtype)

    # Evaluate, train, evaluate.
    log = make_folder(output_dir) / "metrics.jsonl" if processes.first else Path(os.devnull)
    before = evaluate(forward, test_texts, test_split.labels, len(names), processes, "before")
    print(f"macro-F1 before training: {macro_f1(before):.4f}")
    trained = train(forward, train_texts, train_split.labels, options, processes, log)
    after = evaluate(forward, test_texts, test_split.labels, len(names), processes, "after")
    print(f"macro-F1 after training:  {macro_f1(after):.4f}")
    for name, f1 in zip(names, f1_per_class(after), strict=True):
        print(f"  F1 of {name:<20} {f1:.4f}")
    processes.leave()

    # Keep the result.
    results = {
        "model": model_name,
        "dataset": dataset_name,
        "embedded": bool(notice),
        "seed": options.seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": processes.world,
        "options": dataclasses.asdict(options),
        "parameters": {"trainable": trainable, "all": total, "percent": round(100 * trainable / total, 4)},
        "before": scores(before, names),
        "after": scores(after, names),
        "train": trained | {"peak_memory_mb": peak_memory_mb(device)},
    }
    if not processes.first:
        return results
    write_file(output_dir / "results.json", json.dumps(results, indent=2).encode() + b"\n")
    longest = evaluation_batches(test_texts.lengths, forward.tokens)[-1]
    with new_folder(output_dir / "adapter") as adapter:
        model.save_pretrained(adapter)
        tokenizer.save(str(adapter / "tokenizer.json"))
        (adapter / "label_names.json").write_text(json.dumps(names) + "\n", encoding="utf-8")
        again = PeftModel.from_pretrained(load_base(model_name)[0], adapter).to(device)
        cast_frozen_matrices(again, dtype)
        with torch.inference_mode():
            logits = forward(test_texts, longest)
            difference = (Forward(again, device, dtype)(test_texts, longest) - logits).abs().max().item()
        if difference > 0.01 * logits.abs().max():  # of equal weights, some processors compute sums in another order
            raise AssertionError(f"the saved adapter gives logits that differ by {difference}")
    equal = "equal logits" if difference == 0 else f"logits equal to {difference:.0e}"
    print(f"saved {output_dir}/results.json, metrics.jsonl and adapter (loaded again onto a fresh base: {equal})")
    if options.merged_output is not None:
        merged = load_base(model_name)[0]  # in float32, of which a merge costs no more than rounding
        PeftModel.from_pretrained(merged, output_dir / "adapter").merge_and_unload()
        save_pretrained(merged, tokenizer, options.merged_output, names)
        print(f"saved {options.merged_output}, the merged model")
    if notice:
        print(notice)
    return results


def check_folders(output_dir: Path, merged_output: str | None) -> None:
    """Raises UserError if the results would overwrite something, or each other."""
    refuse_to_overwrite(output_dir)
    if merged_output is not None:
        merged_dir, run_dir = Path(merged_output).resolve(), output_dir.resolve()
        refuse_to_overwrite(merged_dir)
        if merged_dir in [run_dir, *run_dir.parents] or merged_dir in [run_dir / name for name in RUN_FILES]:
            raise UserError(f"--merged-output {merged_output} is in the way of {output_dir}: name another folder")


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


def fingerprint(options: Options, dtype: torch.dtype, model: nn.Module, data: list[np.ndarray]) -> dict[str, Any]:
    """What must be equal in all processes: the options, but for the folders that the first writes, and what was loaded."""
    weights = [parameter.detach().numpy() for parameter in model.parameters()]
    given = dataclasses.asdict(options) | {"dtype": dtype, "output_dir": None, "merged_output": None}
    return {flag(name): value for name, value in given.items()} | {
        "the model": checksum(weights),
        "the data": checksum(data),
    }


def checksum(arrays: Iterable[np.ndarray]) -> int:
    return functools.reduce(lambda value, array: zlib.crc32(array.data, value), arrays, 0)


def train(
    forward: Forward, texts: TokenizedTexts, labels: np.ndarray, options: Options, processes: Processes, log: Path
) -> dict[str, Any]:
    """The loop: AdamW on what is trainable, one line of metrics every LOG_EVERY steps. Returns what it measured."""
    device = forward.device
    groups = parameter_groups(forward.model, options.learning_rate, options.loraplus_lr_ratio)
    optimizer = AdamW(groups, options.weight_decay)
    examples = options.epochs * len(labels)
    steps = options.epochs * math.ceil(len(labels) / options.batch_size)
    step, done, losses = 0, 0, []
    forward.model.train()
    start = time.perf_counter()
    with open(log, "w") as metrics, progress(examples, "train", quiet=not processes.first) as bar:
        for epoch in range(options.epochs):
            for batch in training_batches(texts.lengths, options.batch_size, options.seed, epoch):
                step += 1
                share = schedule(step, steps, options.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = share * group["highest_lr"]

                torch.manual_seed(random_seed(options.seed, step, processes.rank))  # of dropout
                loss = torch.zeros((), device=device)
                for part in micro_batches(texts.lengths, processes.share(batch), forward.tokens):
                    logits, target = forward(texts, part), forward.move(torch.from_numpy(labels[part]))
                    part_of_loss = F.cross_entropy(logits, target, reduction="sum") / len(batch)
                    part_of_loss.backward()
                    loss += part_of_loss.detach()
                processes.sum_gradients(optimizer.parameters, loss)
                norm = nn.utils.clip_grad_norm_(optimizer.parameters, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()

                losses.append(loss)
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
                        "learning_rate": share * options.learning_rate,
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


def parameter_groups(model: nn.Module, learning_rate: float, ratio: float) -> list[dict[str, Any]]:
    """Everything trainable; B learns `ratio` times as fast as the rest (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise UserError("nothing in this model is trainable: load the adapter with is_trainable=True")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        highest = learning_rate * ratio if name.endswith(".lora_B.weight") else learning_rate
        groups.setdefault(highest, []).append(parameter)
    return [{"params": group, "highest_lr": highest} for highest, group in groups.items()]


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate at `step` of 1..steps: up to 1 in warmup * steps, then down towards 0."""
    rising = max(1.0, warmup * steps)
    return min(step / rising, (steps - step + 1) / (steps - rising + 1))


def warn_of_a_long_run(bar: tqdm, seconds_per_example: float, examples: int) -> None:
    minutes = seconds_per_example * examples / 60
    if minutes > 15:
        limit = int(examples * 10 / minutes / 1000) * 1000 or 500
        bar.write(f"training will take about {minutes:,.0f} minutes here; --train-limit {limit} with --epochs 1 takes about 10")


def random_seed(*numbers: int) -> int:
    """A seed of 64 bits that depends on every one of `numbers`, so that a step's dropout is the same whatever came before."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made: {error.strerror}") from error
    return folder


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rather than fail at a class name that the console cannot show
    return exit_status("train.py", lambda: run(parse(arguments, __doc__)))


if __name__ == "__main__":
    sys.exit(main())
