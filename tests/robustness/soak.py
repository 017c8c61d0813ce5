"""Ten minutes of killing, resuming, labelling and swapping adapters: memory must not grow, and no file may be left behind.

python tests/robustness/soak.py [--minutes 10]
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tokenizers import Tokenizer

import predict
import train
from lora import PeftModel
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained
from model.pretrained import _embedded_folder
from training.checkpoint import newest_first

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter/adapter_model.safetensors"


def memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def quietly(main, *arguments: str) -> str:
    """Run a program of this project in this process. Returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(list(arguments))
    assert status == 0, err.getvalue()
    return out.getvalue()


def kill_somewhere(words: list[str], run: Path, rng: random.Random) -> None:
    """Start the run in another process, and kill it at a random moment after its first checkpoint."""
    command = [sys.executable, "train.py", *words, "--output-dir", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not newest_first(run):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    rng, rounds, killed = random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        torch.manual_seed(0)
        config = DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128, num_labels=4)
        tokenizer = Tokenizer.from_file(str(_embedded_folder() / "tokenizer.json"))
        save_pretrained(DistilBertForSequenceClassification(config), tokenizer, root / "model")
        options = ["--epochs", "2", "--train-limit", "400", "--test-limit", "40", "--checkpoint-every", "3"]
        words = ["--model", str(root / "model"), "--dataset", "sample", *options]
        alone, other = root / "alone", root / "other"
        quietly(train.main, *words, "--output-dir", str(alone))
        quietly(train.main, *words, "--seed", "1", "--output-dir", str(other))
        labelled = quietly(predict.main, str(alone), "Oil prices rose", "--json")
        swapped = PeftModel.from_pretrained(load_pretrained(str(root / "model"), 4)[0], alone / "adapter")
        left = sorted(path.name for path in root.iterdir())

        memory, files = 0.0, 0
        end, warm = time.monotonic() + 60 * minutes, time.monotonic() + 15 * minutes
        while time.monotonic() < end:
            run = root / "run"
            kill_somewhere(words, run, rng)
            if not (run / "results.json").exists():
                killed += 1
                quietly(train.main, "--resume", str(run))
            assert (run / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes(), "the adapter differs from the unkilled run's"
            assert quietly(predict.main, str(run), "Oil prices rose", "--json") == labelled
            for adapter in (other, run):
                swapped.load_adapter(adapter / "adapter")
            shutil.rmtree(run)
            assert sorted(path.name for path in root.iterdir()) == left, "files left behind"
            rounds += 1
            if time.monotonic() < warm or not files:
                memory, files = max(memory, memory_mb()), open_files()
            assert memory_mb() <= 1.05 * memory, f"memory grew from {memory:.0f} to {memory_mb():.0f} MB in round {rounds}"
            assert open_files() <= files, f"open files grew from {files} to {open_files()}"
        print(f"{rounds} rounds, {killed} killed and resumed: equal results, nothing left behind,")
        print(f"{memory_mb():.0f} MB ({memory:.0f} after warming up), {open_files()} open files")


if __name__ == "__main__":
    main()
