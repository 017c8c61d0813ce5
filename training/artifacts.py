"""What a run leaves in its folder: metrics while it trains; at the end an adapter or a model, its card, and results.json."""

import dataclasses
import json
import os
import platform
import shutil
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.files import append_line, new_folder, refuse_to_overwrite, write_file
from data import evaluation_batches
from lora import PeftModel, count_parameters
from model import DistilBertForSequenceClassification, load_pretrained, save_pretrained, write_tokenizer
from training.checkpoint import FOLDER as CHECKPOINTS
from training.device import cast_frozen_matrices, dtype_name
from training.evaluation import ModelRunner
from training.loading import Inputs
from training.model_card import model_card
from training.options import Options

PACKAGES = ("torch", "tokenizers", "safetensors", "huggingface-hub", "numpy")
EVENTS = "tensorboard"
FILES = ("metrics.jsonl", "results.json", "adapter", "model", CHECKPOINTS, EVENTS)


def check_outputs(run: Path, options: Options, new: bool) -> None:
    """Raises UserError if the results would overwrite something, or each other, or could not be written at all."""
    if options.tensorboard:
        summary_writer()
    if new:
        refuse_to_overwrite(run)
    if options.merged_output is not None:
        merged_dir, run_dir = (Path(os.path.realpath(path)) for path in (options.merged_output, run))
        refuse_to_overwrite(merged_dir)
        if merged_dir in [run_dir, *run_dir.parents] or merged_dir in [run_dir / name for name in FILES]:
            raise UserError(f"--merged-output {options.merged_output} would overwrite the run in {run}. Choose another folder")
        with new_folder(merged_dir):  # if this fails, it fails now and not after hours of training
            pass


class Metrics:
    """Writes metrics.jsonl, one line at a time, and the same to TensorBoard if asked, from after `step` on.

    Raises UserError if TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool):
        self.path = run / "metrics.jsonl"
        self.events = summary_writer()(str(run / EVENTS), purge_step=step + 1) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        append_line(self.path, json.dumps({"step": step, **values}))
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()


def summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs another package. Install it: pip install -e '.[tensorboard]'") from error
    return SummaryWriter


def summary(options: Options, inputs: Inputs, runner: ModelRunner) -> dict[str, Any]:
    """The part of results.json that says what was run."""
    trainable, total = count_parameters(runner.model)
    return {
        "model": inputs.model,
        "dataset": inputs.dataset,
        "embedded": bool(inputs.notice),
        "commit": inputs.commit,
        "dataset_commit": inputs.dataset_commit,
        "sha256": inputs.sha256,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "seed": options.seed,
        "device": runner.device.type,
        "dtype": dtype_name(runner.dtype),
        "options": dataclasses.asdict(options),
        "parameters": {"trainable": trainable, "all": total, "percent": round(100 * trainable / total, 4)},
    }


def save_run(run: Path, results: dict[str, Any], runner: ModelRunner, inputs: Inputs, options: Options) -> None:
    """Save what was trained. results.json is written last: it marks the run as ended."""
    folder, difference = save_trained(run, results, runner, inputs)
    if options.merged_output is not None:
        merged = inputs.load_base()  # in float32, so that merging rounds as little as possible
        PeftModel.from_pretrained(merged, folder).merge_and_unload()
        save_pretrained(merged, inputs.tokenizer, options.merged_output, inputs.label_names, options.max_length)
    write_file(run / "results.json", json.dumps(results, indent=2).encode() + b"\n")
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    equal = "equal logits" if difference == 0 else f"logits equal to within {difference:.0e}"
    print(f"saved {run}/results.json, metrics.jsonl and {folder.name} (reloaded: {equal})")
    if options.merged_output is not None:
        print(f"saved {options.merged_output}, the merged model")
    if inputs.notice:
        print(inputs.notice)


def save_trained(run: Path, results: dict[str, Any], runner: ModelRunner, inputs: Inputs) -> tuple[Path, float]:
    """Write RUN/adapter, or RUN/model if every weight was trained, with its card. Then load it and compare the logits.

    Returns the folder, and the largest difference of a logit.
    """
    model = typing.cast(DistilBertForSequenceClassification | PeftModel, runner.model)
    max_length = results["options"]["max_length"]
    folder = run / ("adapter" if isinstance(model, PeftModel) else "model")
    with new_folder(folder) as new:
        if isinstance(model, PeftModel):
            model.save_pretrained(new)
            write_tokenizer(inputs.tokenizer, max_length, new)
            (new / "label_names.json").write_text(json.dumps(inputs.label_names) + "\n", encoding="utf-8")
            # trainable, so that A and B stay float32 as in `model`
            reloaded: nn.Module = PeftModel.from_pretrained(inputs.load_base(), new, is_trainable=True)
        else:
            save_pretrained(model, inputs.tokenizer, new, inputs.label_names, max_length)
            reloaded = load_pretrained(str(new), len(inputs.label_names))[0]
        (new / "README.md").write_text(model_card(results), encoding="utf-8")
        cast_frozen_matrices(reloaded.to(runner.device), runner.dtype)
        longest = evaluation_batches(inputs.test.texts.lengths, runner.tokens)[-1]
        with torch.inference_mode():
            logits = runner(inputs.test.texts, longest)
            again = ModelRunner(reloaded, runner.device, runner.dtype)(inputs.test.texts, longest)
        difference = (again - logits).abs().max().item()
        if difference > 0.01 * logits.abs().max():  # not 0: some processors add up in another order each time
            raise AssertionError(f"{folder}: after reloading, the logits differ by {difference}")
    return folder, difference
