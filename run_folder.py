"""What a run leaves in its folder: metrics as it goes, and in the end an adapter or a model, with its card."""

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from checkpoint import FOLDER as CHECKPOINTS
from data import TokenizedTexts, evaluation_batches
from errors import UserError
from evaluate import Forward
from files import append_line, new_folder, refuse_to_overwrite, write_file
from lora import PeftModel
from machine import cast_frozen_matrices
from model import DistilBertForSequenceClassification, load_pretrained, save_pretrained

EVENTS = "tensorboard"
FILES = ("metrics.jsonl", "results.json", "adapter", "model", CHECKPOINTS, EVENTS)


def check_folders(run: Path, merged_output: str | None, new: bool) -> None:
    """Raises UserError if the results would overwrite something, or each other."""
    if new:
        refuse_to_overwrite(run)
    if merged_output is not None:
        merged_dir, run_dir = Path(merged_output).resolve(), run.resolve()
        refuse_to_overwrite(merged_dir)
        if merged_dir in [run_dir, *run_dir.parents] or merged_dir in [run_dir / name for name in FILES]:
            raise UserError(f"--merged-output {merged_output} is in the way of {run}: name another folder")


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made: {error.strerror}") from error
    return folder


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


def save_trained(
    run: Path,
    forward: Forward,
    tokenizer: Tokenizer,
    names: list[str],
    card: str,
    texts: TokenizedTexts,
    load_base: Callable[[], nn.Module],
) -> tuple[Path, float]:
    """Write what was trained, RUN/adapter or, if everything was, RUN/model, and load it again.

    Returns the folder, and by how much logits of `texts` differ then.
    """
    model = typing.cast(DistilBertForSequenceClassification | PeftModel, forward.model)
    longest = evaluation_batches(texts.lengths, forward.tokens)[-1]
    folder = run / ("adapter" if isinstance(model, PeftModel) else "model")
    with new_folder(folder) as new:
        if isinstance(model, PeftModel):
            model.save_pretrained(new)
            (new / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            (new / "label_names.json").write_text(json.dumps(names) + "\n", encoding="utf-8")
            again: nn.Module = PeftModel.from_pretrained(load_base(), new)
        else:
            save_pretrained(model, tokenizer, new, names)
            again = load_pretrained(str(new), len(names))[0]
        write_file(new / "README.md", card.encode())
        cast_frozen_matrices(again.to(forward.device), forward.dtype)
        with torch.inference_mode():
            logits = forward(texts, longest)
            difference = (Forward(again, forward.device, forward.dtype)(texts, longest) - logits).abs().max().item()
        if difference > 0.01 * logits.abs().max():  # of equal weights, some processors compute sums in another order
            raise AssertionError(f"{folder}, loaded again, gives logits that differ by {difference}")
    return folder, difference
