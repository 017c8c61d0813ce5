"""`lora` stands alone: only it is installed, a copy of its folder works, and modules of common names do not get in the way."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers import adapted

from lora.errors import UserError

ROOT = Path(__file__).parent.parent
NAMES = ["errors", "files", "model", "data", "config", "common"]

# two layers, trained, saved and loaded; prints where `lora` was imported from
USE = """
import torch
from torch import nn

import lora
from lora import LoraConfig, PeftModel, get_peft_model

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

model = get_peft_model(network(), LoraConfig(r=2, target_modules=["0", "2"], task_type=None))
x, labels = torch.randn(16, 4), torch.arange(16) % 2
trained = [p for p in model.parameters() if p.requires_grad]
losses = []
for _ in range(30):
    loss = nn.functional.cross_entropy(model(x), labels)
    losses.append(loss.item())
    with torch.no_grad():  # by hand: torch.optim would import the compiler of torch, which takes two seconds
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained)):
            p -= 0.3 * gradient
assert losses[-1] < 0.9 * losses[0], losses

model.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(network(), "adapter")
assert torch.equal(loaded(x), model(x))
assert not torch.equal(loaded(x), network()(x))
with loaded.disable_adapter():
    assert torch.equal(loaded(x), network()(x))
print(lora.__file__)
"""


def add_traps(folder: Path, names: Iterable[str]) -> Path:
    """Modules that raise when they are imported."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the wrong {name}.py was imported')\n")
    return folder


def python(folder: Path, *arguments: str | Path, path: str | Path = "") -> str:
    """What Python prints, run in `folder` with nothing but `path` as PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, built from a copy: setuptools leaves files in the folder that it builds."""
    for package in ("pip", "setuptools"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} builds the wheel, and is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "shared")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    python(folder, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "./source")
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_has_one_top_level_name(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in files if ".dist-info/" not in name} == {"lora"}
    sources = {f"lora/{path.name}" for path in (ROOT / "lora").glob("*.py")}
    assert {name for name in files if name.startswith("lora/")} == sources


def test_the_installed_package_works_beside_errors_py(wheel, tmp_path):
    """A user's own errors.py stands beside their script, and so comes first on the path."""
    site = tmp_path / "site"
    python(tmp_path, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    project = add_traps(tmp_path / "project", NAMES)
    (project / "script.py").write_text(USE)
    assert python(project, "script.py", path=site).strip() == str(site / "lora" / "__init__.py")


def test_a_copy_of_the_folder_works(tmp_path):
    folder = add_traps(tmp_path / "project", NAMES)
    shutil.copytree(ROOT / "lora", folder / "lora", ignore=shutil.ignore_patterns("__pycache__"))
    assert python(folder, "-c", USE).strip() == str(folder / "lora" / "__init__.py")


@pytest.mark.parametrize("path", sorted((ROOT / "lora").glob("*.py")), ids=lambda path: path.name)
def test_lora_imports_only_torch_and_safetensors(path):
    """Apart from itself and the standard library; and from huggingface_hub, in the functions that go to the hub."""
    allowed = {"lora", "torch", "safetensors", *sys.stdlib_module_names}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            within = set() if node in tree.body else {"huggingface_hub"}
            assert {name.partition(".")[0] for name in names} <= allowed | within
            assert not getattr(node, "level", 0)


def test_without_numpy_saving_says_so(tmp_path, monkeypatch):
    model = adapted()
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(UserError, match="safetensors needs numpy to write a file: pip install numpy"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors*"))


# modules that stood in the project's root once, or that other packages install
OTHERS = ["evaluate", "options", "report", "errors", "files", "optimizer", "checkpoint", "hub"]


@pytest.mark.parametrize(
    "on_path",
    [pytest.param(False, id="in the working directory", marks=pytest.mark.slow), pytest.param(True, id="on PYTHONPATH")],
)
def test_train_py_runs_beside_modules_of_common_names(tmp_path, on_path):
    folder = add_traps(tmp_path / "folder", [*OTHERS, *NAMES])
    assert python(folder, ROOT / "train.py", "--help", path=folder if on_path else "").startswith("usage: train.py")


def test_train_can_be_imported_beside_such_modules(tmp_path):
    """Even where the working directory comes first on the path."""
    folder = add_traps(tmp_path / "folder", OTHERS)
    assert python(folder, "-c", "import train; print(train.__file__)", path=ROOT).strip() == str(ROOT / "train.py")
