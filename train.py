"""Fine-tune DistilBERT on AG News with LoRA: the whole experiment, from top to bottom.

python train.py                                          distilbert-base-uncased on ag_news, r = 2 on q_lin and v_lin
python train.py --model minilm --dataset sample          the same on the embedded encoder and corpus, without a network
python train.py --dataset my/folder                      your own train and test, as .jsonl or .csv (see data/datasets.py)
python train.py --resume runs/2026-11-24-103855          go on with a run that was stopped, whatever stopped it
python train.py --help                                   every option

torchrun --nproc-per-node 4 train.py                     on the four GPUs of one machine, or with four processes on its cores
torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --master-addr HOST --master-port 29500 train.py
                                                         on two machines; on the second, with --node-rank 1
"""

import dataclasses
import io
import itertools
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from checkpoint import FOLDER as CHECKPOINTS
from checkpoint import Checkpoint, Checkpoints, Signals, fingerprint, read_newest
from data import TokenizedTexts, evaluation_batches, load_dataset, micro_batches, tokenize, training_batches
from errors import UserError, exit_status
from evaluate import Forward, evaluate, f1_per_class, macro_f1, progress, scores
from files import HubUnreachable, append_line, new_folder, refuse_if_unwritable, refuse_to_overwrite, write_file
from lora import PeftModel, get_peft_model
from machine import cast_frozen_matrices, choose_device, choose_dtype, peak_memory_mb
from model import DistilBertForSequenceClassification, hub_commit, load_pretrained, save_pretrained, weights_sha256
from optimizer import AdamW, parameter_groups, schedule
from options import DEFAULT_DATASET, DEFAULT_MODEL, EMBEDDED_DATASET, EMBEDDED_MODEL, Options, parse
from processes import Processes

LOG_EVERY = 10  # steps
PACKAGES = ("torch", "tokenizers", "safetensors", "huggingface-hub", "numpy")
RUN_FILES = ("metrics.jsonl", "results.json", "adapter", CHECKPOINTS)  # of a run's folder


def run(options: Options, saved: Checkpoint | None = None) -> dict[str, Any]:
    """The experiment, from its beginning or from a checkpoint. Returns what it writes into results.json."""
    processes = Processes()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = options.lora_config()
    output_dir = saved.run if saved else Path(options.output_dir or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    if processes.first:
        check_folders(output_dir, options.merged_output, new=saved is None)
    processes.join(device)

    # Data and model: what was asked for, or, where nothing was and there is no hub, what is embedded.
    asked_data, asked_model = (saved.dataset, saved.model) if saved else (options.dataset, options.model)
    dataset, dataset_name, data_notice = load_or_step_in(load_dataset, asked_data, DEFAULT_DATASET, EMBEDDED_DATASET)
    names = dataset.label_names
    if asked_model is None and options.revision is not None:
        asked_model = DEFAULT_MODEL

    def load_at_commit(name: str) -> tuple[DistilBertForSequenceClassification, Tokenizer, str | None]:
        commit = (saved and saved.commit) or hub_commit(name, options.revision)  # for a branch may move while we train
        return *load_pretrained(name, len(names), commit or options.revision), commit

    def load_base() -> DistilBertForSequenceClassification:
        return load_pretrained(model_name, len(names), commit or options.revision)[0]

    torch.manual_seed(options.seed)  # the head starts at random
    loaded_model, model_name, model_notice = load_or_step_in(load_at_commit, asked_model, DEFAULT_MODEL, EMBEDDED_MODEL)
    base, tokenizer, commit = loaded_model
    sha256 = weights_sha256(model_name, commit or options.revision)
    notice = saved.notice if saved else "\n".join(filter(None, [model_notice, data_notice]))
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
    data = [train_texts.ids, train_split.labels, test_texts.ids, test_split.labels]
    loaded = fingerprint(options, dtype, f"{sha256} {base.config}", data)
    if saved:
        saved.refuse_changes(processes.world, loaded)
    processes.agree(loaded | {"the checkpoint": saved and saved.step})
    cast_frozen_matrices(model.to(device), dtype)
    forward = Forward(model, device, dtype)

    # Evaluate, train, evaluate.
    def score(what: str) -> np.ndarray:
        return evaluate(forward, test_texts, test_split.labels, len(names), processes, what)

    with Signals(output_dir) as signals:
        if processes.first:
            make_folder(output_dir)
        before = np.array(saved.before) if saved else score("before")
        print(f"macro-F1 before training: {macro_f1(before):.4f}")
        about = {
            "options": dataclasses.asdict(options),
            "model": model_name,
            "commit": commit,
            "dataset": dataset_name,
            "notice": notice,
            "processes": processes.world,
            "fingerprint": loaded,
            "before": before.tolist(),
        }
        checkpoints = Checkpoints(output_dir, options.checkpoint_every, about, write=processes.first)
        trained = train(forward, train_texts, train_split.labels, options, processes, signals, checkpoints, saved)
        after = score("after")
        print(f"macro-F1 after training:  {macro_f1(after):.4f}")
        for name, f1 in zip(names, f1_per_class(after), strict=True):
            print(f"  F1 of {name:<20} {f1:.4f}")
        processes.leave()

        # Keep the result; results.json is written last, and says that the run has ended.
        results = {
            "model": model_name,
            "dataset": dataset_name,
            "embedded": bool(notice),
            "commit": commit,
            "sha256": {"weights": sha256, "data": loaded["the data"]},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
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
        difference = save_adapter(output_dir / "adapter", model, tokenizer, names, forward, test_texts, load_base())
        if options.merged_output is not None:
            merged = load_base()  # in float32, of which a merge costs no more than rounding
            PeftModel.from_pretrained(merged, output_dir / "adapter").merge_and_unload()
            save_pretrained(merged, tokenizer, options.merged_output, names)
        write_file(output_dir / "results.json", json.dumps(results, indent=2).encode() + b"\n")
        shutil.rmtree(output_dir / CHECKPOINTS, ignore_errors=True)
    equal = "equal logits" if difference == 0 else f"logits equal to {difference:.0e}"
    print(f"saved {output_dir}/results.json, metrics.jsonl and adapter (loaded again onto a fresh base: {equal})")
    if options.merged_output is not None:
        print(f"saved {options.merged_output}, the merged model")
    if notice:
        print(notice)
    return results


def save_adapter(
    folder: Path,
    model: PeftModel,
    tokenizer: Tokenizer,
    names: list[str],
    forward: Forward,
    texts: TokenizedTexts,
    base: nn.Module,
) -> float:
    """Write the adapter's folder and load it again onto a fresh `base`. Returns by how much logits of `texts` differ then."""
    longest = evaluation_batches(texts.lengths, forward.tokens)[-1]
    with new_folder(folder) as adapter:
        model.save_pretrained(adapter)
        (adapter / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (adapter / "label_names.json").write_text(json.dumps(names) + "\n", encoding="utf-8")
        again = PeftModel.from_pretrained(base, adapter).to(forward.device)
        cast_frozen_matrices(again, forward.dtype)
        with torch.inference_mode():
            logits = forward(texts, longest)
            difference = (Forward(again, forward.device, forward.dtype)(texts, longest) - logits).abs().max().item()
        if difference > 0.01 * logits.abs().max():  # of equal weights, some processors compute sums in another order
            raise AssertionError(f"the saved adapter gives logits that differ by {difference}")
    return difference


def check_folders(output_dir: Path, merged_output: str | None, new: bool) -> None:
    """Raises UserError if the results would overwrite something, or each other, or could not be written at the end."""
    if new:
        refuse_to_overwrite(output_dir)
    if merged_output is not None:
        merged_dir, run_dir = Path(merged_output).resolve(), output_dir.resolve()
        refuse_to_overwrite(merged_dir)
        if merged_dir in [run_dir, *run_dir.parents] or merged_dir in [run_dir / name for name in RUN_FILES]:
            raise UserError(f"--merged-output {merged_output} is in the way of {output_dir}: name another folder")
        refuse_if_unwritable(merged_dir)


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


def train(
    forward: Forward,
    texts: TokenizedTexts,
    labels: np.ndarray,
    options: Options,
    processes: Processes,
    signals: Signals,
    checkpoints: Checkpoints,
    saved: Checkpoint | None,
) -> dict[str, Any]:
    """The loop: AdamW on what is trainable, one line of metrics every LOG_EVERY steps. Returns what it measured.

    It goes on from `saved`, if there is one. Raises UserError if a loss or gradient is not finite, and Stopped after a signal.
    """
    device, model = forward.device, forward.model
    optimizer = AdamW(parameter_groups(model, options.learning_rate, options.loraplus_lr_ratio), options.weight_decay)
    steps_of_epoch = math.ceil(len(labels) / options.batch_size)
    examples, steps = options.epochs * len(labels), options.epochs * steps_of_epoch
    first, seconds_before, losses = (saved.step, saved.seconds, saved.losses) if saved else (0, 0.0, [])
    if saved:
        saved.restore(model, optimizer)
        print(f"going on after step {first} of {steps}")
    checkpoints.clean(first)
    model.train()
    start = time.perf_counter() - seconds_before
    recent: list[tuple[int, np.ndarray, torch.Tensor]] = []  # steps of which nobody has looked at loss and gradient norm yet

    def examples_until(step: int) -> int:
        epoch, step = divmod(step, steps_of_epoch)
        return epoch * len(labels) + min(step * options.batch_size, len(labels))

    def look() -> None:
        """Wait for the device, and see that the steps since the last look can be trusted."""
        for step, batch, loss_and_norm in recent:
            loss, norm = loss_and_norm.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(not_finite(step, batch, loss, norm, options))
            losses.append(loss)
        recent.clear()

    def save(step: int) -> None:
        look()
        checkpoints.save(step, model, optimizer, time.perf_counter() - start, losses)

    if not saved:
        save(0)
    with signals.after_step(), progress(examples, "train", quiet=not processes.first) as bar:
        bar.update(examples_until(first))
        batches = (
            (epoch, batch)
            for epoch in range(options.epochs)
            for batch in training_batches(texts.lengths, options.batch_size, options.seed, epoch)
        )
        for step, (epoch, batch) in enumerate(itertools.islice(batches, first, None), first + 1):
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
            stopping = processes.sum_gradients(optimizer.parameters, loss, signals.received)
            norm = nn.utils.clip_grad_norm_(optimizer.parameters, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()

            recent.append((step, batch, torch.stack([loss, norm])))
            # to ask a GPU, which works on its own, is to wait for it
            stop = int(stopping) if device.type == "cpu" or step % LOG_EVERY == 0 else 0
            bar.update(len(batch))
            if step % LOG_EVERY == 0 or step == steps:
                look()
                seconds, done = time.perf_counter() - start, examples_until(step)
                mean = sum(losses) / len(losses)
                losses.clear()
                bar.set_postfix(loss=f"{mean:.3f}")
                line = {
                    "step": step,
                    "epoch": epoch,
                    "loss": mean,
                    "learning_rate": share * options.learning_rate,
                    "gradient_norm": norm.item(),
                    "examples_per_second": done / seconds,
                }
                if processes.first:
                    append_line(checkpoints.run / "metrics.jsonl", json.dumps(line))
                if step == LOG_EVERY:
                    warn_of_a_long_run(bar, seconds / done, examples)
            if stop or step == steps or checkpoints.due(step):
                save(step)
            if stop:
                signals.stop(stop)
    seconds = time.perf_counter() - start
    return {
        "examples": examples,
        "steps": steps,
        "seconds": round(seconds, 3),
        "examples_per_second": round(examples / seconds, 3),
    }


def not_finite(step: int, batch: np.ndarray, loss: float, norm: float, options: Options) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    rows = ", ".join(str(i + 1) for i in sorted(batch.tolist()))
    return (
        f"{what} at step {step}, on the training examples {rows} (counted from 1), with --learning-rate "
        f"{options.learning_rate:g}, --lora-alpha {options.lora_alpha:g}, --r {options.r} and --dtype {options.dtype}: try a "
        f"smaller --learning-rate, or --dtype float32; the last checkpoint is from before it"
    )


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


def start(typed: dict[str, Any]) -> dict[str, Any]:
    """A run with the options that were typed, or one that goes on with its own."""
    if "resume" not in typed:
        return run(Options(**typed))
    saved = read_newest(Path(typed["resume"]))
    return run(saved.resume_options(typed), saved)


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rather than fail at a class name that the console cannot show
    return exit_status("train.py", lambda: start(parse(arguments, __doc__)), needs_output=False)


if __name__ == "__main__":
    sys.exit(main())
