import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers on two cores: a thread for each, and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need the whole run come last: it is trained beside the others."""
    late = {item.path for item in items if "whole_run" in item.fixturenames}
    items.sort(key=lambda item: item.path in late)


@pytest.fixture(scope="session", autouse=True)
def whole_run_begins(request, tmp_path_factory) -> Path:
    """Where the whole run will be. The first worker trains it, in the background, if a test will use it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    if any("whole_run" in item.fixturenames for item in request.session.items):
        with contextlib.suppress(FileExistsError):
            (shared / "runs").mkdir()
            threading.Thread(target=train_whole_run, args=(shared,), daemon=True).start()
    return shared


def train_whole_run(shared: Path) -> None:
    """`python train.py --epochs 3` without a hub, on the embedded model and data."""
    no_hub = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(shared / "empty")}
    where = ["--output-dir", str(shared / "runs" / "whole"), "--merged-output", str(shared / "runs" / "merged")]
    command = [sys.executable, "train.py", "--epochs", "3", *where]
    done = subprocess.run(command, cwd=ROOT, env=no_hub, capture_output=True, text=True)
    (shared / "unfinished.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    (shared / "unfinished.json").rename(shared / "whole_run.json")


@pytest.fixture(scope="session")
def whole_run(whole_run_begins) -> tuple[Path, str]:
    """Its folder, beside the folder `merged`, and its output."""
    deadline = time.monotonic() + 500
    while not (whole_run_begins / "whole_run.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    status, printed, errors = json.loads((whole_run_begins / "whole_run.json").read_text())
    assert status == 0, errors
    return whole_run_begins / "runs" / "whole", printed


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests on tiny matrices, which take longer to share out between threads than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
