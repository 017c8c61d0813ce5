"""Checkpoints: a run that was stopped, by whatever, goes on from one and ends as if nothing had happened.

A checkpoint is one safetensors file, RUN/checkpoints/step-00000120.safetensors: what is trained, AdamW's state, and in its
header, as JSON, everything else: the step, the options, the result before training, and by what to know data and model again.
No random state is in it, for there is none to keep: the order of the examples is a function of (seed, epoch), and a step's
dropout of (seed, step, process).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from common.errors import Stopped, UserError
from common.files import read_metadata, read_safetensors, write_file
from training.optimizer import AdamW
from training.options import Options, flag

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = "checkpoints"
KEEP = 2
INTERVAL = 30.0  # seconds between two checkpoints, unless --checkpoint-every says how many steps,
SHARE = 0.01  # or longer, so that they take no more than this share of the time
# from one part of a run to the next: its result stays the same
MAY_CHANGE = ("resume", "checkpoint_every", "merged_output", "tensorboard", "quiet")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    tensors: dict[str, Tensor]
    step: int  # how many were taken
    seconds: float  # that they took
    losses: list[float]  # of the steps that no line of metrics has told yet
    options: dict[str, Any]
    model: str  # the names of what was loaded, whoever chose it
    commit: str | None  # of the hub
    dataset: str
    notice: str
    processes: int
    fingerprint: dict[str, Any]
    before: list[list[int]]  # the confusion matrix before training

    @property
    def run(self) -> Path:
        return self.path.parent.parent

    def resume_options(self, typed: dict[str, Any]) -> Options:
        """The run's options. Raises UserError if one that was typed contradicts them."""
        for name, value in typed.items():
            if name not in MAY_CHANGE and value != (own := self.options.get(name)):
                raise UserError(
                    f"{flag(name)} is {value}, and {own} in the run in {self.run}: leave it out, or start a new run"
                )
        return Options(**self.options | typed)

    def refuse_changes(self, processes: int, fingerprint: dict[str, Any]) -> None:
        """Raises UserError if the run would not go on as what it was."""
        if processes != self.processes:
            raise UserError(f"the run in {self.run} was one of {self.processes} processes: start as many, not {processes}")
        for what, value in json.loads(json.dumps(fingerprint)).items():
            if value != self.fingerprint.get(what):
                raise UserError(f"{what} is not what it was when the run in {self.run} began: start a new run")

    def restore(self, model: nn.Module, optimizer: AdamW) -> None:
        """Put the tensors back where `tensors_of` found them."""
        places = tensors_of(model, optimizer)
        if {key: place.shape for key, place in places.items()} != {key: own.shape for key, own in self.tensors.items()}:
            raise UserError(f"{self.path} holds other tensors than this run trains: start a new run")
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(self.tensors[key])


class Checkpoints:
    """Those of one run, KEEP of them at a time. Each says `about` of the run; only one process is to write any.

    From `clean` on, the run's folder is locked for as long as this object, or the process, lives.
    """

    def __init__(self, run: Path, every: int | None, about: dict[str, Any], write: bool):
        self.run, self.every, self.about, self.write = run, every, about, write
        self.cost, self.last = 0.0, time.monotonic()

    def due(self, step: int) -> bool:
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.last > max(INTERVAL, self.cost / SHARE)

    def save(self, step: int, model: nn.Module, optimizer: AdamW, seconds: float, losses: list[float]) -> None:
        """Write one, whole or not at all, and then remove the oldest. Raises UserError if it cannot be written."""
        if not self.write:
            return
        start = time.monotonic()
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors_of(model, optimizer).items()}
        state = json.dumps({"step": step, "seconds": seconds, "losses": losses, **self.about})
        content = safetensors.torch.save(tensors, metadata={"state": state, "sha256": sha256(state, tensors)})
        write_file(self.run / FOLDER / f"step-{step:08}.safetensors", content)
        for old in newest_first(self.run)[KEEP:]:
            with contextlib.suppress(OSError):
                old.unlink()
        self.last = time.monotonic()
        self.cost = self.last - start

    def clean(self, step: int) -> None:
        """Begin the run, or undo what it did after `step`: lines of metrics, the last perhaps cut short, and files.

        Raises UserError if another process is at work on the run, or what is to be undone cannot be.
        """
        if not self.write:
            return
        self.lock()
        if (self.run / "results.json").exists():
            raise UserError(f"another run has ended in {self.run} meanwhile: name another folder")
        metrics = self.run / "metrics.jsonl"
        later = [path for path in newest_first(self.run) if path.stem > f"step-{step:08}"]  # damaged, or not gone on from
        try:
            ended = [path for name in ("adapter", "model") for path in (*self.run.glob(f".{name}.*"), self.run / name)]
            for half in [*self.run.rglob(".*.partial"), *ended, *later]:
                shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)
            lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        except OSError as error:
            raise UserError(f"{error.filename} is in the way of the run, and cannot be removed: {error.strerror}") from error
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                kept += [line] if line.endswith(b"\n") and json.loads(line)["step"] <= step else []
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{metrics}, line {number}: damaged; remove the line, and go on") from error
        write_file(metrics, b"".join(kept))

    def lock(self) -> None:
        if fcntl is None:
            return
        with contextlib.suppress(OSError):  # some network's files know no locks
            handle = os.open(self.run, os.O_RDONLY)
            weakref.finalize(self, os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is at work on the run in {self.run}: let it end, or end it") from error


def tensors_of(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Everything that a step changes, by the name of its parameter."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {
        f"{name}/{kind}": tensor for name, parameter in trained.items() for kind, tensor in optimizer.state[parameter].items()
    }
    return {**trained, **state}


def read_newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run that is whole; one that is damaged is named and passed over.

    Raises UserError if the run has ended, or has no checkpoint that is whole.
    """
    if (run / "results.json").exists():
        raise UserError(f"the run in {run} has ended: its results.json is there")
    if not (paths := newest_first(run)):
        raise UserError(f"{run} holds no checkpoint to go on from: start the run again")
    for path in paths:
        try:
            return _read(path)
        except UserError as error:
            print(f"{error}: passed over")
    raise UserError(f"no checkpoint in {run / FOLDER} is whole: start the run again")


def newest_first(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*.safetensors"), reverse=True)


def _read(path: Path) -> Checkpoint:
    tensors, metadata = read_safetensors(path), read_metadata(path)
    state = metadata.get("state", "")
    if sha256(state, tensors) != metadata.get("sha256"):
        raise UserError(f"{path} is damaged (its sha256 differs)")
    try:
        saved = Checkpoint(path, tensors, **json.loads(state))
        Options(**saved.options)
        return saved
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} was written by another version of this program") from error


def sha256(state: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return digest.hexdigest()


def fingerprint(options: Options, dtype: torch.dtype, model: str, data: str) -> dict[str, Any]:
    """What must be equal in all processes, and when a run goes on: the options, and what tells models and data apart."""
    given = dataclasses.asdict(options) | {"dtype": str(dtype)}
    return {flag(name): value for name, value in given.items() if name not in (*MAY_CHANGE, "output_dir")} | {
        "the model": model,
        "the data": data,
    }


class Signals:
    """SIGINT (Ctrl-C) and SIGTERM within `with Signals(run) as signals:` raise Stopped, which says how to go on.

    Within `with signals.after_step():` the first only sets `received`, so that the step can be finished.
    """

    def __init__(self, run: Path):
        self.run, self.received, self.patient = run, 0, False

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if not self.patient or self.received:
            self.stop(number)
        self.received = number

    @contextlib.contextmanager
    def after_step(self) -> Iterator[None]:
        self.patient = True
        try:
            yield
        finally:
            self.patient = False
        if self.received:  # when the last step was over
            self.stop(self.received)

    def stop(self, number: int) -> None:
        resume = f"; to go on: --resume {self.run}" if newest_first(self.run) else ""
        raise Stopped(f"stopped by {signal.Signals(number).name}{resume}", number)
