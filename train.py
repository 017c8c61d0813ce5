"""Fine-tune DistilBERT on AG News with LoRA: the whole experiment, from top to bottom.

python train.py                                          distilbert-base-uncased on ag_news, r = 2 on q_lin and v_lin
python train.py --model minilm --dataset sample          the embedded encoder and corpus, without a network
python train.py --dataset tickets.csv                    your own texts (data/tables.py lists the forms of files)
python train.py --method full                            every weight, or only the head (compare.py compares them)
python train.py --adapter runs/2026-11-24-103855         start from a trained adapter, ours or peft's
python train.py --resume runs/2026-11-24-103855          continue a run that was stopped
python train.py --help                                   every option

torchrun --nproc-per-node 4 train.py                     four GPUs of one machine, or four processes on its cores
torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --master-addr HOST --master-port 29500 train.py
                                                         two machines; on the second, with --node-rank 1
"""

if __name__ == "__main__":
    import training.interrupt  # noqa: F401 - Ctrl-C during the imports below

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import run_cli
from data import micro_batches, training_batches
from lora import get_peft_model, print_trainable_parameters
from lora.files import make_folder
from training.artifacts import Metrics, check_outputs, save_run, summary
from training.checkpoint import Checkpoint, Checkpoints, fingerprint, read_newest
from training.data_summary import describe_scores
from training.device import DTYPES, cast_frozen_matrices, choose_device, choose_dtype, dtype_name, peak_memory_mb
from training.distributed import Distributed
from training.evaluation import Examples, ModelRunner, confusion_matrix, evaluate, macro_f1, predict, progress_bar, scores
from training.fast_cpu import limit_caches
from training.in_memory import as_table, check_keywords
from training.inference import Classifier
from training.inference import load_classifier as load
from training.loading import load_inputs
from training.optimizer import lr_multiplier, parameter_groups, trained_parameters
from training.options import Options, parse
from training.plan import describe_plan, loss_function, plan
from training.run_folder import require_stopped
from training.sanity_checks import frozen_sha256, lora_checks, refuse_not_finite
from training.signals import Signals
from training.starting_adapter import with_adapter
from training.validation import Validation

LOG_EVERY = 10  # steps


def run(options: Options, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """The experiment, from its beginning or from a checkpoint. Returns the content of results.json."""
    limit_caches()
    processes = Distributed()
    device = choose_device(options.device)
    folder = checkpoint.run if checkpoint else Path(options.output_dir or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    if processes.is_main:
        check_outputs(folder, options, new=checkpoint is None)
    processes.join(device)
    # a resumed run keeps its arithmetic, and all processes use that of the first
    dtype, reason = (checkpoint.dtype, "as before") if checkpoint else choose_dtype(options.dtype, device)
    dtype = DTYPES[processes.from_main(DTYPES.index(dtype))]

    # Data and model.
    inputs = load_inputs(options, checkpoint)
    model: nn.Module = inputs.base
    data = f"{inputs.sha256['data']} {inputs.label_names}"
    identity = fingerprint(options, dtype, f"{inputs.sha256['weights']} {inputs.base.config}", data)
    identity["the adapter"] = inputs.sha256.get("adapter")
    if checkpoint:
        checkpoint.refuse_changes(processes.world_size, identity)
    processes.require_same(identity | {"the checkpoint": checkpoint and checkpoint.step})

    # LoRA: freeze the model, put A and B beside its projections, train them and a copy of the head.
    # (--method head trains only the head; --method full leaves the model as it is and trains all of it.)
    if inputs.lora_config is not None:
        model = get_peft_model(model, inputs.lora_config)
        if inputs.adapter is not None:  # --adapter: start from its A, B and head
            inputs.adapter.copy_to(model)
    print(f"arithmetic in {dtype_name(dtype)} ({reason})")
    print_trainable_parameters(model)
    cast_frozen_matrices(model.to(device), dtype)
    runner = ModelRunner(model, device, dtype)
    frozen_hash = None if options.quiet else frozen_sha256(model)
    if not options.quiet:
        title = "LoRA checks" if inputs.lora_config else "checks"
        print(title, *lora_checks(runner, inputs.train, options.adapter), sep="\n  ")
    if frozen_hash:
        print(f"  frozen weights before training: sha256 {frozen_hash[:16]}")

    # Evaluate, train, evaluate.
    num_labels = len(inputs.label_names)
    with Signals(folder) as signals, contextlib.ExitStack() as at_end:
        if processes.is_main:
            make_folder(folder)
        started = time.perf_counter()
        before = np.array(checkpoint.before) if checkpoint else evaluate(runner, inputs.test, num_labels, processes, "before")
        print(f"macro-F1 before training: {macro_f1(before):.4f}")
        print(describe_plan(inputs, options, None if checkpoint else time.perf_counter() - started))
        provenance = {"options": dataclasses.asdict(options), "processes": processes.world_size, "fingerprint": identity}
        provenance |= {**inputs.provenance(), "before": before.tolist()}
        checkpoints = Checkpoints(folder, options.checkpoint_every, provenance, processes.is_main, checkpoint)
        at_end.enter_context(checkpoints.lock)
        validation = Validation(runner, inputs.validation, num_labels, processes, options.patience)
        measured = train(runner, inputs.train, validation, options, processes, checkpoints, signals)
        if dtype == torch.int8:  # trained over rounded weights, used over the real ones
            runner = ModelRunner(model, device, torch.float32)
        predictions = predict(runner, inputs.test.texts, processes, "after")
        after = confusion_matrix(inputs.test.labels, predictions.labels, num_labels)
        print(f"macro-F1 after training:  {macro_f1(after):.4f}")
        print(*describe_scores(after, inputs.label_names), sep="\n")
        if frozen_hash:
            print(f"  frozen weights after training:  {'unchanged' if frozen_sha256(model) == frozen_hash else 'CHANGED'}")
        processes.leave()
        results = summary(options, inputs, runner) | {
            "dtype": dtype_name(dtype),
            "processes": processes.world_size,
            "before": scores(before, inputs.label_names),
            "after": scores(after, inputs.label_names),
            "train": measured,
        }
        if processes.is_main:
            save_run(checkpoints, results, predictions, runner, inputs, options)
    return results


def train(
    runner: ModelRunner,
    examples: Examples,
    validation: Validation,
    options: Options,
    processes: Distributed,
    checkpoints: Checkpoints,
    signals: Signals,
) -> dict[str, Any]:
    """The loop. Continues from the run's checkpoint, if there is one. Returns what it measured.

    A batch is cut twice. Its shards are computed by different processes at the same time. The micro-batches of a shard are
    computed one after the other, so that memory stays bounded however long the texts are. Their gradients add up:

        batch (16 texts) -> shard (every world_size-th text) -> micro-batch (at most 1,024 tokens) -> logits -> loss

    Raises UserError if a loss or gradient is not finite, and Stopped after a signal.
    """
    model = runner.model
    texts, labels = examples
    parameters = list(trained_parameters(model).values())
    groups = parameter_groups(model, options.learning_rate, options.loraplus_lr_ratio, options.head_lr_ratio)
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, fused=True)
    cross_entropy = loss_function(labels, validation.num_labels, options).to(runner.device)
    epochs, steps = plan(len(labels), options)
    resumed_step, seconds_before, losses = checkpoints.begin(model, optimizer, validation)
    if resumed_step:
        print(f"continuing after step {resumed_step} of {steps}")
    metrics = Metrics(checkpoints, resumed_step, options.tensorboard and processes.is_main)
    started = time.perf_counter() - seconds_before
    model.train()

    step = examples_seen = 0
    batches = (
        (epoch, batch)
        for epoch in range(epochs)
        for batch in training_batches(texts.lengths, options.batch_size, options.seed, epoch)
    )
    with signals.delayed(), progress_bar(epochs * len(labels), "train", quiet=not processes.is_main) as bar:
        for epoch, batch in batches:
            if step >= resumed_step and validation.ends_the_run():
                break
            step += 1
            examples_seen += len(batch)
            bar.update(len(batch))
            if step <= resumed_step:
                continue

            multiplier = lr_multiplier(step, steps, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = multiplier * group["initial_lr"]

            torch.manual_seed(dropout_seed(options.seed, step, processes.rank))
            loss = torch.zeros((), device=runner.device)
            for micro_batch in micro_batches(texts.lengths, processes.shard(batch), runner.tokens):
                logits = runner(texts, micro_batch)
                targets = runner.to_device(torch.from_numpy(labels[micro_batch]))
                # divided by the size of the whole batch: the sum over all micro-batches is the mean over the batch
                micro_loss = cross_entropy(logits, targets) / len(batch)
                micro_loss.backward()
                loss += micro_loss.detach()

            stop_signal = processes.all_reduce_gradients(parameters, loss, signals.received)
            norm = nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
            batch_loss, gradient_norm = torch.stack([loss, norm]).tolist()
            refuse_not_finite(batch_loss, gradient_norm, step, batch, options)
            optimizer.step()
            optimizer.zero_grad()

            losses.append(batch_loss)
            scored = {"validation_macro_f1": validation.look(step)} if validation.is_due(step, steps) else {}
            is_last = step == steps or validation.ends_the_run()
            if step % LOG_EVERY == 0 or scored or is_last:
                mean_loss = sum(losses) / len(losses)
                losses.clear()
                bar.set_postfix(loss=f"{mean_loss:.3f}", **scored)
                if processes.is_main:
                    metrics.write(
                        step=step,
                        epoch=epoch,
                        loss=mean_loss,
                        learning_rate=multiplier * options.learning_rate,
                        gradient_norm=gradient_norm,
                        examples_per_second=examples_seen / (time.perf_counter() - started),
                        **scored,
                    )
            if stop_signal or is_last or checkpoints.due(step):
                checkpoints.save(step, time.perf_counter() - started, losses)
            if stop_signal:
                signals.stop(stop_signal)

    seconds = time.perf_counter() - started
    kept_step, kept_score = validation.keep_best() or (step, None)
    return {
        "rows": len(labels),
        "examples": examples_seen,
        "epochs": epochs,
        "steps": step,
        "kept_step": kept_step,
        "validation_macro_f1": kept_score,
        "seconds": round(seconds, 3),
        "examples_per_second": round(examples_seen / seconds, 3),
        "optimizer_bytes": sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()),
        "peak_memory_mb": peak_memory_mb(runner.device),
    }


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A 64-bit seed made from all three. It depends on nothing else, so a resumed run drops the same elements at each step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def start(typed: dict[str, Any]) -> dict[str, Any]:
    """Begin a new run with the typed options, or resume a stopped run with its own options."""
    if "resume" not in typed:
        return run(Options(**with_adapter(typed)))
    stopped = Path(typed["resume"])
    require_stopped(stopped)
    checkpoint = read_newest(stopped)
    return run(checkpoint.resume_options(typed), checkpoint)


def fit(texts: Iterable[str], labels: Iterable, test: tuple[Iterable, Iterable] | None = None, **options: Any) -> Classifier:
    """Train on texts and labels in memory, from a notebook for example, and return the trained classifier.

    Labels are strings, whole numbers or booleans. A tenth of each class is put aside to test on, unless there are test texts
    and labels. The options are those of the command line: fit(texts, labels, epochs=3, r=8). The run is kept in its folder,
    `output_dir`, and the texts beside it. One at a time: torch's seed belongs to the process. Raises UserError as a run does,
    and for texts, labels or options of a wrong type; Stopped, a KeyboardInterrupt that says how to resume, if it is stopped.
    """
    typed = check_keywords(options)
    folder = Path(typed.get("output_dir") or f"runs/{datetime.now():%Y-%m-%d-%H%M%S}")
    with as_table(texts, labels, test, folder) as data:
        start(typed | {"dataset": str(data), "output_dir": str(folder)})
    return load(folder)


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may not be able to show a class name
    return run_cli("train.py", lambda: start(parse(arguments, __doc__)), needs_output=False)


if __name__ == "__main__":
    sys.exit(main())
