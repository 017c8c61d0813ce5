"""Standard output and error that are full, closed, or no longer read: one clear line if possible, and no work lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).parents[2]
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
NO_SPACE = "standard output: No space left on device"


def train(model: Path, run: Path, redirection: str, *more: str) -> subprocess.CompletedProcess:
    options = ["--train-limit", "100", "--test-limit", "8", "--epochs", "1", "--output-dir", run, *more]
    return shell([sys.executable, "-u", "train.py", "--model", model, "--dataset", "sample", *options], redirection)


def shell(command: list, redirection: str) -> subprocess.CompletedProcess:
    """The exit status is that of the command, not of the program that reads its output."""
    line = f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    words = ["bash", "-c", line, "bash", *map(str, command)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)


def unbuffered() -> None:
    sys.stdout.reconfigure(write_through=True)


def closed() -> None:
    sys.stdout = sys.stderr = None  # as Python does it
    os.close(1)
    os.close(2)


@pytest.mark.parametrize(
    ("output", "before", "status"),
    [pytest.param("/dev/full", unbuffered, 2, marks=FULL), ("| head -1", unbuffered, 0), ("closed", closed, 0)],
)
def test_training_goes_on_to_its_end_if_output_fails(small_model, tmp_path, output, before, status):
    run, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    options = ["--train-limit", "40", "--test-limit", "8", "--epochs", "1", "--output-dir", run]
    stdout = {"| head -1": pipe, "closed": ""}.get(output, output)
    with subprocess.Popen(["bash", "-c", 'exec head -1 < "$1"', "bash", pipe], stdout=subprocess.DEVNULL) as head:
        done = python("train.py", "--model", small_model, "--dataset", "sample", *options, stdout=stdout, before=before)
        head.kill()
    assert done.returncode == status
    assert json.loads((run / "results.json").read_text())["train"]["examples"] == 40
    assert "Traceback" not in done.stderr
    assert (NO_SPACE in done.stderr) == (output == "/dev/full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        pytest.param("> /dev/full", 2, marks=FULL),
        pytest.param("2> /dev/full", 0, marks=FULL),
        pytest.param("> /dev/full 2>&1", 2, marks=FULL),
        ("| true", 0),
        ("| head -1", 0),
        (">&-", 0),
        (">&- 2>&-", 0),
    ],
)
def test_training_goes_on_to_its_end_in_a_shell(small_model, tmp_path, redirection, status):
    run = tmp_path / "run"
    done = train(small_model, run, redirection)
    assert done.returncode == status
    assert json.loads((run / "results.json").read_text())["train"]["examples"] == 100
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "metrics.jsonl", "predictions.jsonl", "results.json"]
    assert "Traceback" not in done.stderr
    assert (NO_SPACE in done.stderr.splitlines()[-1]) if redirection == "> /dev/full" else (NO_SPACE not in done.stderr)


@FULL
@pytest.mark.slow
def test_a_refusal_keeps_its_status_if_output_fails(small_model, tmp_path):
    for redirection in ("> /dev/full 2>&1", "2>&-"):
        assert train(small_model, tmp_path / "run", redirection, "--r", "0").returncode == 2


@FULL
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 3000])
def test_labels_that_cannot_be_written_end_in_one_line(whole_run, tmp_path, count):
    (tmp_path / "texts.txt").write_text("A text that is labelled.\n" * count)
    done = python("predict.py", whole_run[0], "--input", tmp_path / "texts.txt", stdout="/dev/full")
    assert done.returncode == 2
    arithmetic, refusal = done.stderr.splitlines()
    assert arithmetic.startswith("arithmetic in ")
    assert refusal == f"predict.py: {NO_SPACE}. Mend that, or name another one"
