"""What a run leaves in its folder: metrics as it goes; in the end an adapter or a model, with its card, and results.json."""

import dataclasses
import json
import platform
import shutil
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from common.files import append_line, new_folder, refuse_if_unwritable, refuse_to_overwrite, write_file
from data import evaluation_batches
from lora import PeftModel, count_parameters
from model import DistilBertForSequenceClassification, load_pretrained, save_pretrained
from training.checkpoint import FOLDER as CHECKPOINTS
from training.device import cast_frozen_matrices, peak_memory_mb
from training.distributed import Distributed
from training.evaluation import ModelRunner, scores
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
        merged_dir, run_dir = Path(options.merged_output).resolve(), run.resolve()
        refuse_to_overwrite(merged_dir)
        if merged_dir in [run_dir, *run_dir.parents] or merged_dir in [run_dir / name for name in FILES]:
            raise UserError(f"--merged-output {options.merged_output} is in the way of {run}: name another folder")
        refuse_if_unwritable(merged_dir)


class Metrics:
    """metrics.jsonl, a line at a time, and the same for TensorBoard if that is wanted; `step` were taken before.

    Raises UserError if TensorBoard is wanted and not installed.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool):
        self.path, self.events = run / "metrics.jsonl", None
        if tensorboard:
            self.events = summary_writer()(str(run / EVENTS), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        append_line(self.path, json.dumps(line))
        if self.events is not None:
            for name, value in line.items():
                if name != "step":
                    self.events.add_scalar(name, value, line["step"])
            self.events.flush()


def summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: pip install -e '.[tensorboard]'") from error
    return SummaryWriter


def summary(
    options: Options,
    inputs: Inputs,
    forward: ModelRunner,
    processes: Distributed,
    before: np.ndarray,
    after: np.ndarray,
    measured: dict[str, Any],
) -> dict[str, Any]:
    """What results.json says; `before` and `after` are confusion matrices."""
    trainable, total = count_parameters(forward.model)
    return {
        "model": inputs.model,
        "dataset": inputs.dataset,
        "embedded": bool(inputs.notice),
        "commit": inputs.commit,
        "sha256": inputs.sha256,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "seed": options.seed,
        "device": forward.device.type,
        "dtype": str(forward.dtype).removeprefix("torch."),
        "processes": processes.world_size,
        "options": dataclasses.asdict(options),
        "parameters": {"trainable": trainable, "all": total, "percent": round(100 * trainable / total, 4)},
        "before": scores(before, inputs.label_names),
        "after": scores(after, inputs.label_names),
        "train": measured | {"peak_memory_mb": peak_memory_mb(forward.device)},
    }


def save_run(run: Path, results: dict[str, Any], forward: ModelRunner, inputs: Inputs, options: Options) -> None:
    """Keep what was trained; results.json is written last, and says that the run has ended."""
    folder, difference = save_trained(run, results, forward, inputs)
    if options.merged_output is not None:
        merged = inputs.load_base()  # in float32, of which a merge costs no more than rounding
        PeftModel.from_pretrained(merged, folder).merge_and_unload()
        save_pretrained(merged, inputs.tokenizer, options.merged_output, inputs.label_names)
    write_file(run / "results.json", json.dumps(results, indent=2).encode() + b"\n")
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    equal = "equal logits" if difference == 0 else f"logits equal to {difference:.0e}"
    print(f"saved {run}/results.json, metrics.jsonl and {folder.name} (loaded again: {equal})")
    if options.merged_output is not None:
        print(f"saved {options.merged_output}, the merged model")
    if inputs.notice:
        print(inputs.notice)


def save_trained(run: Path, results: dict[str, Any], forward: ModelRunner, inputs: Inputs) -> tuple[Path, float]:
    """Write what was trained, RUN/adapter or, if everything was, RUN/model, with its card, and load it again.

    Returns the folder, and by how much logits differ then.
    """
    model = typing.cast(DistilBertForSequenceClassification | PeftModel, forward.model)
    folder = run / ("adapter" if isinstance(model, PeftModel) else "model")
    with new_folder(folder) as new:
        if isinstance(model, PeftModel):
            model.save_pretrained(new)
            (new / "tokenizer.json").write_text(inputs.tokenizer.to_str(pretty=True), encoding="utf-8")
            (new / "label_names.json").write_text(json.dumps(inputs.label_names) + "\n", encoding="utf-8")
            # trainable, so that A and B stay float32, as those of `model` are
            again: nn.Module = PeftModel.from_pretrained(inputs.load_base(), new, is_trainable=True)
        else:
            save_pretrained(model, inputs.tokenizer, new, inputs.label_names)
            again = load_pretrained(str(new), len(inputs.label_names))[0]
        (new / "README.md").write_text(model_card(results), encoding="utf-8")
        cast_frozen_matrices(again.to(forward.device), forward.dtype)
        longest = evaluation_batches(inputs.test_texts.lengths, forward.tokens)[-1]
        with torch.inference_mode():
            logits = forward(inputs.test_texts, longest)
            difference = (
                (ModelRunner(again, forward.device, forward.dtype)(inputs.test_texts, longest) - logits).abs().max().item()
            )
        if difference > 0.01 * logits.abs().max():  # of equal weights, some processors compute sums in another order
            raise AssertionError(f"{folder}, loaded again, gives logits that differ by {difference}")
    return folder, difference
