"""What a run leaves in its folder: metrics while it trains; at the end an adapter or a model, predictions, and results.json."""

import dataclasses
import json
import os
import platform
import threading
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.files import (
    new_folder,
    read_bytes,
    read_json,
    refuse_to_overwrite,
    require_writable,
    resolve,
    write_file,
    writing,
)
from data import evaluation_batches
from lora import PeftModel, count_parameters
from model import DistilBertForSequenceClassification, load_pretrained, save_pretrained, write_model, write_tokenizer
from training.checkpoint import FOLDER as CHECKPOINTS
from training.checkpoint import Checkpoints, remove_checkpoints
from training.device import cast_frozen_matrices
from training.evaluation import ModelRunner, Predictions
from training.loading import Inputs
from training.model_card import model_card
from training.options import Options
from training.trained_folder import LABELS_FILE

PACKAGES = ("torch", "tokenizers", "safetensors", "huggingface-hub", "numpy")
EVENTS = "tensorboard"
FILES = ("metrics.jsonl", "predictions.jsonl", "results.json", "adapter", "model", CHECKPOINTS, EVENTS)


def check_outputs(run: Path, options: Options, new: bool) -> None:
    """Raises UserError if the results would overwrite something, or each other, or could not be written at all."""
    if options.tensorboard:
        summary_writer()
    if new:
        refuse_to_overwrite(run)
        require_writable(run)
    if options.merged_output is not None:
        merged_dir = resolve(options.merged_output)
        refuse_own_files(merged_dir, run, "--merged-output")
        if new or not (run / "adapter").exists() or not merged_dir.is_dir():  # else it may be its own: save_run will see
            with new_folder(merged_dir):  # if this fails, it fails now and not after hours of training
                pass


def refuse_own_files(path: Path, run: Path, option: str) -> None:
    """Raises UserError if `path` is the folder of the run, contains it, or is or lies in something that the run writes."""
    path, run = resolve(path), resolve(run)
    own = [resolve(run / name) for name in FILES]
    if path in [run, *run.parents] or any(file in [path, *path.parents] for file in own):
        raise UserError(f"{option} {path} would overwrite files of the run in {run}. Choose another name")


class Metrics:
    """Writes metrics.jsonl, one line at a time, and the same to TensorBoard if asked, from after `step` on.

    Lines after `step`, of a run that is resumed, are removed. Raises UserError if one of the lines is damaged, or a file cannot
    be written, or TensorBoard is asked for and not installed.
    """

    def __init__(self, checkpoints: Checkpoints, step: int, tensorboard: bool):
        self.checkpoints = checkpoints
        if checkpoints.write:
            self.cut(checkpoints.path("metrics.jsonl"), step)
        with writing(checkpoints.run / EVENTS):
            self.events = summary_writer()(str(checkpoints.run / EVENTS), purge_step=step + 1) if tensorboard else None

    def cut(self, path: Path, step: int) -> None:
        lines = read_bytes(path).splitlines(keepends=True) if path.exists() else []
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                kept += [line] if line.endswith(b"\n") and json.loads(line)["step"] <= step else []  # the last may be cut short
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not a line of metrics. Remove the line, then resume") from error
        if kept != lines:
            write_file(path, b"".join(kept))

    def write(self, step: int, **values: float) -> None:
        path = self.checkpoints.path("metrics.jsonl")
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.events is not None:
            with writing(self.checkpoints.run / EVENTS):
                for name, value in values.items():
                    self.events.add_scalar(name, value, step)
                self.events.flush()


def summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs another package. Install it: pip install -e '.[tensorboard]'") from error
    show = threading.excepthook
    # it writes in a thread of its own, whose errors it shows, and raises once more in ours
    threading.excepthook = lambda error: None if isinstance(error.exc_value, OSError) else show(error)
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
        "options": dataclasses.asdict(options),
        "parameters": {"trainable": trainable, "all": total, "percent": round(100 * trainable / total, 4)},
    }


def save_run(
    checkpoints: Checkpoints,
    results: dict[str, Any],
    predictions: Predictions,
    runner: ModelRunner,
    inputs: Inputs,
    options: Options,
) -> None:
    """Save what was trained. results.json is written last: it marks the run as ended."""
    run = checkpoints.run
    folder, difference = save_trained(checkpoints, results, runner, inputs)
    if options.merged_output is not None:
        merged = inputs.load_base()  # in float32, so that merging rounds as little as possible
        PeftModel.from_pretrained(merged, folder).merge_and_unload()
        save_pretrained(merged, inputs.tokenizer, options.merged_output, inputs.label_names, options.max_length)
    write_file(checkpoints.path("predictions.jsonl"), predictions_jsonl(predictions, inputs))
    write_file(checkpoints.path("results.json"), json.dumps(results, indent=2).encode() + b"\n")
    remove_checkpoints(checkpoints.path("."))
    equal = "equal logits" if difference == 0 else f"logits equal to within {difference:.0e}"
    print(f"saved {run}/results.json, metrics.jsonl, predictions.jsonl and {folder.name} (reloaded: {equal})")
    if options.merged_output is not None:
        print(f"saved {options.merged_output}, the merged model")
    if inputs.notice:
        print(inputs.notice)


def predictions_jsonl(predictions: Predictions, inputs: Inputs) -> bytes:
    """A line for each text of the test part, in its order: how it begins, its label, and the predicted one with its score."""
    names = inputs.label_names
    rows = zip(inputs.test_texts, inputs.test.labels, predictions.labels, predictions.scores.tolist(), strict=True)
    lines = (
        {"text": text, "label": names[label], "predicted": names[predicted], "score": round(score, 4)}
        for text, label, predicted, score in rows
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def classes_of(inputs: Inputs) -> list[Any]:
    """The names of the classes; or numbers or booleans, if `fit` got such labels and put them beside its rows."""
    path = Path(inputs.dataset) / LABELS_FILE
    classes = read_json(path, list) if path.is_file() else inputs.label_names
    return classes if [str(label).strip() for label in classes] == inputs.label_names else inputs.label_names


def save_trained(checkpoints: Checkpoints, results: dict[str, Any], runner: ModelRunner, inputs: Inputs) -> tuple[Path, float]:
    """Write RUN/adapter, or RUN/model if every weight was trained, with its card. Then load it and compare the logits.

    Returns the folder, and the largest difference of a logit.
    """
    model = typing.cast(DistilBertForSequenceClassification | PeftModel, runner.model)
    max_length = results["options"]["max_length"]
    folder = checkpoints.path("adapter" if isinstance(model, PeftModel) else "model")
    with new_folder(folder) as new:
        if isinstance(model, PeftModel):
            model.save_pretrained(new)
            write_tokenizer(inputs.tokenizer, max_length, new)
            # trainable, so that A and B stay float32 as in `model`
            reloaded: nn.Module = PeftModel.from_pretrained(inputs.load_base(), new, is_trainable=True)
        else:
            write_model(model, inputs.tokenizer, new, inputs.label_names, max_length)
            reloaded = load_pretrained(str(new), len(inputs.label_names))[0]
        if (classes := classes_of(inputs)) != inputs.label_names or isinstance(model, PeftModel):
            (new / LABELS_FILE).write_text(json.dumps(classes) + "\n", encoding="utf-8")
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
