import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores: a thread for each, and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer

from model import DistilBertConfig, DistilBertForSequenceClassification, save_pretrained
from model.pretrained import _embedded_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tokenizer_file() -> Path:
    """The tokenizer of bert-base-uncased, which DistilBERT and MiniLM share, out of the embedded encoder."""
    return _embedded_folder() / "tokenizer.json"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, tokenizer_file) -> Path:
    """A small DistilBERT with random weights and four classes, on disk."""
    torch.manual_seed(0)
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, num_labels=4)
    folder = tmp_path_factory.mktemp("small") / "model"
    save_pretrained(DistilBertForSequenceClassification(config), Tokenizer.from_file(str(tokenizer_file)), folder)
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> tuple[Path, str]:
    """`python train.py` without a hub, on the embedded model and data: its folder and its output."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # the first worker trains, the others wait
    folder, printed = shared / "runs" / "whole", shared / "printed.txt"
    with FileLock(shared / "whole_run.lock"):
        if not printed.exists():
            where = ["--output-dir", str(folder), "--merged-output", str(folder.with_name("merged"))]
            no_hub = {
                **os.environ,
                "OMP_NUM_THREADS": "2",
                "HF_ENDPOINT": "http://127.0.0.1:9",
                "HF_HOME": str(folder.with_name("empty")),
            }
            command = [sys.executable, "train.py", *where]
            done = subprocess.run(command, cwd=ROOT, env=no_hub, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout)
    return folder, printed.read_text()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests on tiny matrices, which take longer to share out between threads than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
