"""A fault at every file operation of a run. Then the run must resume to the same result, or one line must say what to do.

python tests/robustness/faults.py              every operation and kind: half an hour or more
python tests/robustness/faults.py --every 50   a slice; so do --kinds and --scenarios

The runs are new ones (LoRA with a merged model, and every weight) and a resumed one. The faults:

    kill   the process is killed (SIGKILL) before the operation
    half   it is killed when half of what it writes is on disk
    error  the operation fails (EIO), once
    full   the disk is full (ENOSPC): from here on nothing more can be written
    term   the process gets SIGTERM during the operation

An operation is an open, write, flush, rename, removal, new folder, listing, lock or change of permissions, of anything in the
folder that holds model, data, run and merged model. Linux only: each run is a fork, so that it takes a fraction of a second.
"""

import argparse
import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz import tiny_tokenizer

import train
from model import DistilBertConfig, DistilBertForSequenceClassification, save_pretrained
from training.checkpoint import newest_first

SCENARIOS = ("lora", "full", "resume")
KINDS = ("kill", "half", "error", "full", "term")
CHANGES = ("os.mkdir", "os.rename", "write")  # what a full disk refuses, beside opening a file for writing
EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "os.chmod",
    "os.chown",
    "os.utime",
)
STRANGERS = (
    "run/.git/config",
    "run/.adapter.mine/a",
    "run/checkpoints/mine.txt",
    "run/checkpoints/.mine.partial",
    ".merged.mine/a",
)


class Faults:
    """Counts the file operations below `root`, in this process, and does to operation `at` what `kind` says."""

    def __init__(self, root: Path, kind: str, at: int):
        self.root, self.kind, self.at, self.operations = str(root), kind, at, []
        open_, fsync = io.open, os.fsync

        def wrapped_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & {"+", "r"} or not isinstance(file, str | os.PathLike):
                return open_(file, mode, *arguments, **options)
            raw = io.BufferedWriter(File(file, mode.replace("b", ""), self))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding=options.get("encoding"))

        def wrapped_fsync(handle: int) -> None:
            self.operation("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        io.open = builtins.open = wrapped_open  # type: ignore[assignment]
        os.fsync = wrapped_fsync
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], str | os.PathLike):
            is_written = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            self.operation("write" if is_written else event, os.fspath(arguments[0]))
        elif event == "fcntl.flock":
            self.operation(event, os.readlink(f"/proc/self/fd/{arguments[0]}"))

    def operation(self, name: str, path: str, write_half: Callable[[], object] | None = None) -> None:
        if not os.path.abspath(path).startswith(self.root):
            return
        number = len(self.operations)
        self.operations.append(f"{name} {os.path.relpath(path, self.root)}")
        if self.kind == "full" and number >= self.at >= 0 and name in CHANGES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if number != self.at:
            return
        if self.kind == "half" and write_half is not None:
            write_half()
        if self.kind in ("kill", "half"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)


class File(io.FileIO):
    def __init__(self, path: Any, mode: str, faults: Faults):
        super().__init__(path, mode)
        self.faults = faults

    def write(self, content: Any) -> int:
        self.faults.operation("write", os.fspath(self.name), lambda: super(File, self).write(content[: len(content) // 2]))
        return super().write(content)


def fork(root: Path, arguments: list[str], kind: str = "none", at: int = -1) -> tuple[int, str, list[str]]:
    """Run train.py in a child. Returns its exit status (minus the signal that killed it), its errors and its operations."""
    log = root.with_name("log")
    sys.stdout.flush()
    if not (child := os.fork()):
        status = 1
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(handle, 2)
        faults = Faults(root, kind, at)
        try:
            status = train.main(arguments)
        except BaseException:
            traceback.print_exc()
        if kind == "none":
            os.write(handle, ("\n" + "\n".join(["OPERATIONS", *faults.operations])).encode())
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    errors, _, operations = log.read_text(errors="replace").partition("OPERATIONS\n")
    return status, errors, operations.splitlines()


def listing(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


def result(root: Path) -> dict[str, Any]:
    """What must be equal: every file, except for the measured times."""
    files = [name for name in listing(root) if name not in STRANGERS]
    known: dict[str, Any] = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in files}
    if "run/results.json" in known:
        results = json.loads((root / "run" / "results.json").read_text())
        known["run/results.json"] = [results[key] for key in ("before", "after", "model", "sha256")]
    if "run/metrics.jsonl" in known:
        lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        known["run/metrics.jsonl"] = [(line["step"], line["loss"]) for line in lines]
    return known


def prepare(root: Path) -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=64, max_position_embeddings=16, dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=2
    )
    save_pretrained(DistilBertForSequenceClassification(config), tiny_tokenizer(), root / "model")
    (root / "data").mkdir()
    for part, count in (("train", 24), ("test", 6)):
        rows = [{"text": "ab"[i % 2] * (1 + i % 5), "label": "xy"[i % 2]} for i in range(count)]
        (root / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scenarios(root: Path) -> dict[str, list[str]]:
    few = ["--model", str(root / "model"), "--dataset", str(root / "data"), "--max-length", "16", "--batch-size", "4"]
    few += ["--epochs", "2", "--checkpoint-every", "3", "--dtype", "float32", "--learning-rate", "0.01"]
    few += ["--output-dir", str(root / "run"), "--quiet"]
    return {
        "lora": [*few, "--merged-output", str(root / "merged")],
        "full": [*few, "--method", "full"],
        "resume": ["--resume", str(root / "run")],
    }


def check(root: Path, begin: list[str], arguments: list[str], kind: str, at: int, expected: dict[str, Any]) -> str:
    """Inject one fault, then recover. Returns how, or raises AssertionError."""
    status, errors, _ = fork(root, arguments, kind, at)
    said = errors.strip().splitlines()[-1:] or [""]
    assert "Traceback" not in errors, errors
    assert status in (0, 2, 143, -signal.SIGKILL, -signal.SIGTERM), (status, errors)
    assert status != 2 or said[0].startswith("train.py: "), errors
    how = {0: "unharmed", 2: "refused in one line", -9: "killed"}.get(status, "stopped")
    if newest_first(root / "run") and not (root / "run" / "results.json").exists():
        for name in STRANGERS:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text("of somebody else")
    strangers = [name for name in STRANGERS if (root / name).exists()]
    status, errors, _ = fork(root, ["--resume", str(root / "run")])
    if status == 2 and ("has no checkpoint to resume from" in errors or "there is no folder" in errors):
        status, errors, _ = fork(root, begin)
        how += ", begun again"
    elif status == 2 and "has ended: results.json exists" in errors:
        status = 0
        how += ", had ended"
    else:
        how += ", resumed"
    assert status == 0, errors
    found = result(root)
    wrong = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
    assert not wrong, f"differs: {sorted(wrong)}"
    assert not [name for name in strangers if not (root / name).exists()], "something of somebody else was removed"
    return how


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every N-th operation")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS, choices=SCENARIOS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    failed = 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root, whole = Path(temporary).resolve() / "place", Path(temporary) / "whole"
        prepare(whole)
        shutil.copytree(whole, root)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.main(scenarios(root)["lora"])  # imports what is imported late, once for all children
        shutil.rmtree(root)
        for scenario in options.scenarios:
            arguments = scenarios(root)[scenario]
            begin = arguments if scenario != "resume" else scenarios(root)["lora"]
            shutil.copytree(whole, root)
            status, errors, operations = fork(root, begin)
            assert status == 0, errors
            expected = result(root)
            start = whole
            if scenario == "resume":  # from a run that was killed in the middle
                shutil.rmtree(root)
                shutil.copytree(whole, root)
                at = next(i for i, name in enumerate(operations) if "os.rename" in name and "step-00000009" in name)
                assert fork(root, begin, "kill", at)[0] == -signal.SIGKILL
                start = Path(shutil.copytree(root, Path(temporary) / "killed"))
                operations = fork(root, arguments)[2]
            for kind in options.kinds:
                for at in range(0, len(operations), options.every):
                    if kind == "half" and not operations[at].startswith("write"):
                        continue
                    shutil.rmtree(root)
                    shutil.copytree(start, root)
                    try:
                        how = check(root, begin, arguments, kind, at, expected)
                    except AssertionError as error:
                        print(f"{scenario}, {kind} at operation {at}, {operations[at]}: {error}", file=sys.stderr)
                        failed += 1
                        continue
                    counts[f"{kind}: {how}"] += 1
                print(f"{scenario}, {kind} at {len(operations)} operations: {counts.total()} faults so far", flush=True)
            shutil.rmtree(root)
    for line, count in sorted(counts.items()):
        print(f"{count:6} {line}")
    print(f"{counts.total()} faults, each resumed to the same result or was refused in one line; {failed} others")
    print(f"{time.monotonic() - begun:.0f} seconds", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
