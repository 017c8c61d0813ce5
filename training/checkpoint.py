"""Checkpoints: a stopped run continues from its newest one and ends as if it had never stopped, bit for bit.

A checkpoint is one safetensors file, RUN/checkpoints/step-00000120.safetensors. It holds the trained parameters, AdamW's
state and, if there is a validation part, the best parameters so far. Its header holds the rest as JSON: the step, the options,
the scores before training, and the sha256 of model and data. It holds no random state, because there is none: the order of the
examples is a function of (seed, epoch), and the dropout of a step is a function of (seed, step, process).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError
from common.files import locked, read_safetensors, refuse_to_overwrite, remove_partials, write_file, writing
from training.optimizer import trained_parameters
from training.options import Options, flag
from training.validation import Validation

FOLDER, NAME = "checkpoints", re.compile(r"step-\d{8}\.safetensors")
KEEP = 2
# of each parameter: its value, the state of torch.optim.AdamW, and the value of the best look
STATE = {"", "step", "exp_avg", "exp_avg_sq", "best"}
INTERVAL = 30.0  # seconds between two checkpoints without --checkpoint-every ...
SHARE = 0.01  # ... or longer, so that they take at most this share of the run time
# options that do not affect the result, so that they may differ after a resume
MAY_CHANGE = ("resume", "checkpoint_every", "merged_output", "tensorboard", "quiet")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    tensors: dict[str, Tensor]
    step: int  # number of steps taken
    seconds: float  # of training so far
    losses: list[float]  # of the steps since the last line of metrics
    options: dict[str, Any]
    model: str
    commit: str | None  # of the model, if it comes from the hub
    dataset: str
    notice: str
    processes: int
    fingerprint: dict[str, Any]
    before: list[list[int]]  # the confusion matrix before training
    dataset_commit: str | None = None
    looks: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # at the validation part

    @property
    def run(self) -> Path:
        return self.path.parent.parent

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.fingerprint["--dtype"].removeprefix("torch."))

    def resume_options(self, typed: dict[str, Any]) -> Options:
        """The run's options. Raises UserError if a typed option contradicts them."""
        for name, value in typed.items():
            if name not in MAY_CHANGE and value != self.options.get(name):
                differs = f"{flag(name)} is {value}, but the run in {self.run} began with {self.options.get(name)}"
                raise UserError(f"{differs}. Leave the option out, or start a new run")
        return Options(**self.options | typed)

    def refuse_changes(self, processes: int, fingerprint: dict[str, Any]) -> None:
        """Raises UserError if the resumed run would not equal the run that was stopped."""
        if processes != self.processes:
            raise UserError(f"number of processes: {self.processes} in {self.run}, {processes} now. Start as many as before")
        for key, value in json.loads(json.dumps(fingerprint)).items():
            if value != self.fingerprint.get(key):
                raise UserError(f"{key} has changed since the run in {self.run} began. Start a new run")

    def restore(self, model: nn.Module, optimizer: Optimizer, validation: Validation) -> None:
        """Put trained parameters, optimizer and validation back. Raises UserError if this is not the state of such a run."""
        parameters = trained_parameters(model)
        saved = {key.partition("/")[::2]: tensor for key, tensor in self.tensors.items()}  # by name and kind
        shapes = {name: tensor.shape for (name, kind), tensor in saved.items() if not kind}
        if shapes != {name: p.shape for name, p in parameters.items()} or {kind for _, kind in saved} - STATE:
            raise UserError(f"{self.path} comes from another version of this program. Start a new run")
        for (name, kind), tensor in saved.items():
            parameter = parameters[name]
            if not kind:
                parameter.data.copy_(tensor)
            elif kind == "best":
                validation.best[name] = tensor.to(parameter.device, copy=True)
            else:
                optimizer.state[parameter][kind] = tensor.to(parameter.device, copy=True)
        validation.looks = [(step, score) for step, score in self.looks]


class Checkpoints:
    """The newest KEEP checkpoints of one run. `provenance` goes into each. Only the process with `write` writes.

    `begin` locks the run's folder, until `lock` is closed or the process ends.
    """

    def __init__(self, run: Path, every: int | None, provenance: dict, write: bool, resume_from: Checkpoint | None = None):
        self.run, self.every, self.provenance, self.write, self.resume_from = run, every, provenance, write, resume_from
        self.cost, self.last = 0.0, time.monotonic()
        self.handle: int | None = None
        self.lock = contextlib.ExitStack()  # closed at the end of the run, or with the process

    def due(self, step: int) -> bool:
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.last > max(INTERVAL, self.cost / SHARE)

    def begin(self, model: nn.Module, optimizer: Optimizer, validation: Validation) -> tuple[int, float, list[float]]:
        """Start the run, or restore it. Returns its steps so far, their seconds, and the losses not yet in the metrics.

        Raises UserError if another process uses the folder, or if what the run did after the checkpoint cannot be undone.
        """
        self.state = model, optimizer, validation
        if self.resume_from is None:
            self.clean(0)
            self.save(0, 0.0, [])
            return 0, 0.0, []
        self.resume_from.restore(*self.state)
        self.clean(self.resume_from.step)
        return self.resume_from.step, self.resume_from.seconds, list(self.resume_from.losses)

    def save(self, step: int, seconds: float, losses: list[float]) -> None:
        """Write a checkpoint, whole or not at all, then remove the oldest. Raises UserError if it cannot be written."""
        if not self.write:
            return
        start = time.monotonic()
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state_tensors(*self.state).items()}
        now = {"step": step, "seconds": seconds, "losses": losses, "looks": self.state[2].looks}
        state = json.dumps(self.provenance | now)
        content = safetensors.torch.save(tensors, metadata={"state": state, "sha256": sha256(state, tensors)})
        write_file(self.path(FOLDER) / f"step-{step:08}.safetensors", content)
        for old in newest_first(self.run)[KEEP:]:
            with contextlib.suppress(OSError):
                old.unlink()
        self.last = time.monotonic()
        self.cost = self.last - start

    def path(self, name: str) -> Path:
        """Where to write a file of the run. Raises UserError if its folder is no longer the one that was locked."""
        with writing(self.run):
            if self.handle is not None and not os.path.samestat(os.fstat(self.handle), self.run.stat()):
                raise OSError(0, "its folder was removed, and this is another one. Start the run again elsewhere")
        return self.run / name

    def clean(self, step: int) -> None:
        """Lock the run's folder, and remove the checkpoints after `step` and what a killed process left of a file."""
        if not self.write:
            return
        self.handle = self.lock.enter_context(locked(self.run))
        if (self.run / "results.json").exists():
            raise UserError(f"another run has ended in {self.run} since this one began. Choose another folder")
        if self.resume_from is None and step == 0:
            refuse_to_overwrite(self.run)
        try:
            remove_own_files(self.run, after=f"step-{step:08}")
        except OSError as error:
            raise UserError(f"{error.filename} cannot be removed ({error.strerror}). Move it out of the run folder") from error


def state_tensors(model: nn.Module, optimizer: Optimizer, validation: Validation) -> dict[str, Tensor]:
    """All that a step changes: each trained parameter under its name, and its state and best value under NAME/exp_avg etc."""
    parameters = trained_parameters(model)
    state = {f"{name}/{kind}": tensor for name, p in parameters.items() for kind, tensor in optimizer.state[p].items()}
    return {**parameters, **state, **{f"{name}/best": tensor for name, tensor in validation.best.items()}}


def read_newest(run: Path) -> Checkpoint:
    """The newest undamaged checkpoint of a run. Damaged ones are named and skipped.

    Raises UserError if it has no undamaged one, or has ended. Then they are removed, in case it was killed before it did so.
    """
    paths = newest_first(run)
    if (run / "results.json").exists():
        remove_checkpoints(run)
        raise UserError(f"the run in {run} has ended: results.json exists. There is nothing to resume")
    if not paths:
        raise UserError(f"{run} has no checkpoint to resume from. Start the run again")
    for path in paths:
        try:
            return _read(path)
        except UserError as error:
            if not os.access(path, os.R_OK):
                raise UserError(f"{path} cannot be read. Change its permissions, then resume") from error
            print(f"skipped: {error}")
    raise UserError(f"no checkpoint in {run / FOLDER} can be used. Start the run again, in another folder")


def newest_first(run: Path) -> list[Path]:
    """The checkpoints of a run. Raises UserError if their folder cannot be read."""
    try:
        return sorted((path for path in (run / FOLDER).iterdir() if NAME.fullmatch(path.name)), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{run / FOLDER} cannot be read: {error.strerror}. Change its permissions, then try again") from error


def remove_own_files(run: Path, after: str = "") -> None:
    """Remove the checkpoints after that one [all of them], and what a killed process left of any file of the run."""
    for name in (f"{FOLDER}/step-*", "metrics.jsonl", "predictions.jsonl", "results.json"):
        remove_partials(run / name)
    for path in [path for path in newest_first(run) if path.stem > after]:
        path.unlink()


def remove_checkpoints(run: Path) -> None:
    """Remove what a run that has ended needs no more. What others put there stays."""
    with contextlib.suppress(OSError, UserError):
        remove_own_files(run)
        (run / FOLDER).rmdir()


def _read(path: Path) -> Checkpoint:
    tensors = read_safetensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    state = metadata.get("state", "")
    if sha256(state, tensors) != metadata.get("sha256"):
        raise UserError(f"{path} is damaged (its sha256 differs)")
    try:
        checkpoint = Checkpoint(path, tensors, **json.loads(state))
        Options(**checkpoint.options)
        return checkpoint
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} comes from another version of this program") from error


def sha256(state: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # as bytes, because NumPy has no bfloat16
    return digest.hexdigest()


def fingerprint(options: Options, dtype: torch.dtype, model: str, data: str) -> dict[str, Any]:
    """What must be equal in all processes, and before and after a resume: options, model and data."""
    values = dataclasses.asdict(options) | {"dtype": str(dtype)}
    compared = {flag(name): value for name, value in values.items() if name not in (*MAY_CHANGE, "output_dir")}
    return compared | {"the model": model, "the data": data}
