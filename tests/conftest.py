from pathlib import Path

import pytest

from model.pretrained import _embedded_folder


@pytest.fixture(scope="session")
def tokenizer_file() -> Path:
    """The tokenizer of bert-base-uncased, which DistilBERT and MiniLM share, out of the embedded encoder."""
    return _embedded_folder() / "tokenizer.json"
