"""Several real processes that train one model: same result as one, only one writes, none waits for a dead one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import Python, start_ranks
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from model import DistilBertConfig, DistilBertForSequenceClassification, save_pretrained
from training.distributed import Distributed

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_file) -> Path:
    """A small DistilBERT without dropout, so that the numbers do not depend on which process computes what."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=4
    )
    folder = tmp_path_factory.mktemp("small") / "model"
    save_pretrained(DistilBertForSequenceClassification(config), Tokenizer.from_file(str(tokenizer_file)), folder)
    return folder


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    options = ["--model", str(model), "--dataset", "sample", "--output-dir", str(output), "--lora-dropout", "0"]
    return ["train.py", *options, "--dtype", "float32", "--learning-rate", "3e-3", *more]


def wait_for_training(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_same_model_as_one(world_size, model, tmp_path):
    """20 steps of 6 examples, the last of 2, and 5 test examples: some of four processes have nothing to do."""
    few = ["--train-limit", "116", "--batch-size", "6", "--epochs", "1", "--test-limit", "5"]
    adapters, results, losses, outputs, scores = [], [], [], [], []
    for processes in (1, world_size):
        folder = tmp_path / str(len(outputs))
        command = arguments(model, folder, *few)
        started = start_ranks([command] * processes) if processes > 1 else [Python(*command)]
        for process in reversed(started):
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert process is started[0] or output == ""
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter",
            "metrics.jsonl",
            "predictions.jsonl",
            "results.json",
        ]
        outputs.append(output.replace(str(folder), "FOLDER"))
        adapters.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        results.append(json.loads((folder / "results.json").read_text()))
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        scores.append([line.pop("score") for line in lines])
        results[-1]["after"]["predictions"] = lines
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert [result["processes"] for result in results] == [1, world_size]
    assert [result["train"]["steps"] for result in results] == [20, 20]
    moved = max(tensor.abs().max() for name, tensor in adapters[0].items() if "lora_B" in name)
    assert moved > 0.01  # far beyond the tolerance below
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=1e-5)
    assert scores[1] == pytest.approx(scores[0], abs=2e-4)
    assert len(scores[0]) == 5
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for when in ("before", "after"):
        assert results[1][when] == results[0][when]
        assert sum(map(sum, results[1][when]["confusion_matrix"])) == 5
    assert outputs[1] == outputs[0]


def test_under_torchrun_a_killed_process_ends_the_others(model, tmp_path):
    command = [*TORCHRUN, "2", *arguments(model, tmp_path / "run", "--epochs", "1000")]
    launcher = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_training(tmp_path / "run")
    children = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    victim = next(pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_without_torchrun_a_killed_process_ends_the_others(model, tmp_path):
    command = arguments(model, tmp_path / "run", "--epochs", "1000")
    first, second = start_ranks([command, command])
    wait_for_training(tmp_path / "run")
    second.kill()
    _, errors = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 2
    assert "train.py: another process died or does not answer" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_within_a_minute(model, tmp_path):
    command = arguments(model, tmp_path / "run", "--epochs", "1000")
    first, second = start_ranks([command, command])
    wait_for_training(tmp_path / "run")
    second.send_signal(signal.SIGSTOP)
    _, errors = first.communicate(timeout=60)
    second.kill()
    second.communicate()
    assert first.returncode == 2
    assert "train.py: another process died or does not answer" in errors


def test_processes_with_different_options_are_refused(model, tmp_path):
    commands = [arguments(model, tmp_path / "run", "--seed", seed) for seed in ("1", "2")]
    for process in start_ranks(commands):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "--seed differs between processes 0 and 1" in errors
    assert not (tmp_path / "run").exists()


def test_only_gradients_loss_and_signals_travel(monkeypatch):
    sent = []

    def all_reduce(tensor, group):
        sent.append(tensor.numel())
        tensor *= 2

    monkeypatch.setattr("training.distributed.dist.all_reduce", all_reduce)
    processes = Distributed()
    processes.world_size = 2
    one, idle = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
    one.grad, loss = torch.full((2, 3), 0.5), torch.tensor(3.0)
    processes.device = torch.device("cpu")
    assert processes.all_reduce_gradients([one, idle], loss, signal=0) == 0
    assert sent == [6 + 4 + 1 + 2]  # and whether a signal has reached one of the two
    assert torch.equal(one.grad, torch.ones(2, 3))
    assert torch.equal(idle.grad, torch.zeros(4))
    assert loss.item() == 6.0
