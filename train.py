"""Fine-tune DistilBERT on AG News with LoRA: the whole experiment, from top to bottom.

python train.py                                          distilbert-base-uncased on ag_news, r = 2 on q_lin and v_lin
python train.py --model minilm --dataset sample          the same on the embedded encoder and corpus, without a network
python train.py --dataset my/folder                      your own train and test, as .jsonl or .csv (see data/datasets.py)
python train.py --method full                            every weight instead, or the head alone (compare.py runs all three)
python train.py --resume runs/2026-11-24-103855          go on with a run that was stopped, whatever stopped it
python train.py --help                                   every option

torchrun --nproc-per-node 4 train.py                     on the four GPUs of one machine, or with four processes on its cores
torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --master-addr HOST --master-port 29500 train.py
                                                         on two machines; on the second, with --node-rank 1
"""

import dataclasses
import io
import itertools
import math
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.errors import UserError, run_cli
from common.files import make_folder
from data import TokenizedTexts, micro_batches, training_batches
from lora import get_peft_model, print_trainable_parameters
from training.artifacts import Metrics, check_outputs, save_run, summary
from training.checkpoint import Checkpoint, Checkpoints, Signals, fingerprint, read_newest
from training.device import cast_frozen_matrices, choose_device, choose_dtype
from training.distributed import Distributed
from training.evaluation import ModelRunner, evaluate, f1_per_class, macro_f1, progress_bar
from training.loading import load_inputs
from training.optimizer import AdamW, parameter_groups, schedule
from training.options import Options, parse
from training.sanity_checks import frozen_sha256, identities

LOG_EVERY = 10  # steps


def run(options: Options, saved: Checkpoint | None = None) -> dict[str, Any]:
    """The experiment, from its beginning or from a checkpoint. Returns what it writes into results.json."""
    processes = Distributed()
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = options.lora_config()
    folder = saved.run if saved else Path(options.output_dir or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    if processes.is_main:
        check_outputs(folder, options, new=saved is None)
    processes.join(device)

    # Data and model.
    inputs = load_inputs(options, saved)
    model: nn.Module = inputs.base

    # LoRA: everything is frozen but the adapters and the head. (--method head: all but the head; full: nothing.)
    if options.method != "full":
        config = dataclasses.replace(config, base_model_name_or_path=inputs.model, revision=inputs.revision)
        model = get_peft_model(model, config)
    print_trainable_parameters(model)
    alike = fingerprint(options, dtype, f"{inputs.sha256['weights']} {inputs.base.config}", inputs.sha256["data"])
    if saved:
        saved.refuse_changes(processes.world_size, alike)
    processes.require_same(alike | {"the checkpoint": saved and saved.step})
    cast_frozen_matrices(model.to(device), dtype)
    forward = ModelRunner(model, device, dtype)
    frozen = None if options.quiet else frozen_sha256(model)
    if not options.quiet:
        print("\n".join(identities(forward, inputs.train_texts, inputs.train_labels)))
    if frozen:
        print(f"frozen weights before training: sha256 {frozen[:16]}")

    # Evaluate, train, evaluate.
    def score(what: str) -> np.ndarray:
        return evaluate(forward, inputs.test_texts, inputs.test_labels, len(inputs.label_names), processes, what)

    with Signals(folder) as signals:
        if processes.is_main:
            make_folder(folder)
        before = np.array(saved.before) if saved else score("before")
        print(f"macro-F1 before training: {macro_f1(before):.4f}")
        about = {"options": dataclasses.asdict(options), "processes": processes.world_size, "fingerprint": alike}
        about |= {**inputs.found(), "before": before.tolist()}
        checkpoints = Checkpoints(folder, options.checkpoint_every, about, write=processes.is_main)
        measured = train(forward, inputs.train_texts, inputs.train_labels, options, processes, signals, checkpoints, saved)
        after = score("after")
        print(f"macro-F1 after training:  {macro_f1(after):.4f}")
        for name, f1 in zip(inputs.label_names, f1_per_class(after), strict=True):
            print(f"  F1 of {name:<20} {f1:.4f}")
        if frozen:
            print(f"frozen weights after training:  {'the same' if frozen_sha256(model) == frozen else 'NOT THE SAME'}")
        processes.leave()
        results = summary(options, inputs, forward, processes, before, after, measured)
        if processes.is_main:
            save_run(folder, results, forward, inputs, options)
    return results


def train(
    forward: ModelRunner,
    texts: TokenizedTexts,
    labels: np.ndarray,
    options: Options,
    processes: Distributed,
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
    metrics = Metrics(checkpoints.run, first, options.tensorboard and processes.is_main)
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
    with signals.after_step(), progress_bar(examples, "train", quiet=not processes.is_main) as bar:
        bar.update(examples_until(first))
        batches = (
            (epoch, batch)
            for epoch in range(options.epochs)
            for batch in training_batches(texts.lengths, options.batch_size, options.seed, epoch)
        )
        for step, (epoch, batch) in enumerate(itertools.islice(batches, first, None), first + 1):
            of_highest = schedule(step, steps, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = of_highest * group["initial_lr"]

            torch.manual_seed(random_seed(options.seed, step, processes.rank))  # of dropout
            loss = torch.zeros((), device=device)
            for part in micro_batches(texts.lengths, processes.shard(batch), forward.tokens):
                logits, target = forward(texts, part), forward.move(torch.from_numpy(labels[part]))
                part_of_loss = F.cross_entropy(logits, target, reduction="sum") / len(batch)
                part_of_loss.backward()
                loss += part_of_loss.detach()
            stopping = processes.all_reduce_gradients(optimizer.parameters, loss, signals.received)
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
                    "learning_rate": of_highest * options.learning_rate,
                    "gradient_norm": norm.item(),
                    "examples_per_second": done / seconds,
                }
                if processes.is_main:
                    metrics.write(line)
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
        "optimizer_bytes": sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()),
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


def start(typed: dict[str, Any]) -> dict[str, Any]:
    """A run with the options that were typed, or one that goes on with its own."""
    if "resume" not in typed:
        return run(Options(**typed))
    saved = read_newest(Path(typed["resume"]))
    return run(saved.resume_options(typed), saved)


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rather than fail at a class name that the console cannot show
    return run_cli("train.py", lambda: start(parse(arguments, __doc__)), needs_output=False)


if __name__ == "__main__":
    sys.exit(main())
