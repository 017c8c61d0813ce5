"""README.md and the documents beside it are true: commands run, code runs, line counts and quoted output are right.

python -m tests.test_readme    from the root: writes the line counts and the quoted forward into README.md anew
"""

import dataclasses
import http.client
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import predict
import train
from data import load_dataset
from lora import LoRALinear
from training.inference import load_classifier

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MANUAL = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]
DOCUMENTS = [*MANUAL, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
RUN = "runs/2026-11-24-152310"  # the name of a run in the documents
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """The indented and the inline ones, without comments and without an installation that stands before them."""
    matches = re.findall(r"^    ((?:python|pip|torchrun|git|hf|pytest)\b.*)$|`((?:python|pip) [^`]+)`", text, re.MULTILINE)
    return [re.sub(r"^pip install .* && |\s+#.*$", "", "".join(match)) for match in matches]


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))
SHORT = "--model minilm --train-limit 32 --test-limit 16 --epochs 1 --output-dir"
# beginning of a command -> what is added to it here, so that it takes seconds
ADDED = {
    "python train.py --dataset": f" {SHORT} {{new}}",
    "python train.py --adapter": " --train-limit 32 --test-limit 16 --epochs 1 --output-dir {new}",
    "python train.py --help": "",
    "python train.py --model minilm": f" {SHORT} {{new}}",
    "python train.py --resume": "",
    "python predict.py": "",
    "python report.py": "",
    "python compare.py": " --train-limit 32 --test-limit 16 --epochs 1 --output-dir {new}",
    "python bench/": " --tiny --output {new}",
    "torchrun": f" {SHORT} {{new}} --dataset sample",
}
# Not run by test_every_command_runs. Installation: by the slow test below. `python train.py`: by conftest.py. break_it.py,
# faults.py and fuzz.py: by their own tests. soak.py, break_it.py --train and latency.py take minutes. pip-audit needs a
# network, an upload an account. `python -m tests.test_readme` writes into the README.
ELSEWHERE = re.compile(
    r"(pip install|git clone|hf upload|pytest|pip-audit|python tests/robustness/(break_it|faults|fuzz|soak)\.py)\b.*"
    r"|python bench/latency\.py"
    r"|python train\.py( --epochs 3)?|python -m tests\.test_readme"
)
SLOW = ("python bench/", "torchrun", "python compare.py", "python train.py --model", "python train.py --adapter")
# lines that count: "  99  lora/layer.py   the idea", and the same for rooms (lora/) or several names
COUNTED = re.compile(r"^( *[\d,]+)  ((?:(?:[\w/]+\.py|\w+/) )+)", re.MULTILINE)
GENERATED = ("results.json", "label_names.json", "adapter_config.json", "tokenizer.json", "config.json")  # by a run


def count_lines(name: str) -> int:
    files = (ROOT / name).glob("*.py") if name.endswith("/") else [ROOT / name]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def with_true_counts(text: str) -> str:
    """`text` with the right number of lines before each file or room that it lists."""

    def counted(match: re.Match) -> str:
        lines = f"{sum(map(count_lines, match[2].split())):,}"
        return f"{lines:>{len(match[1])}}  {match[2]}"

    return COUNTED.sub(counted, text)


def with_true_forward(text: str) -> str:
    """`text` with the forward of lora/layer.py as its first block of Python."""
    forward = textwrap.dedent(inspect.getsource(LoRALinear.forward))
    return re.sub(r"```python\n.*?```", lambda _: f"```python\n{forward}```", text, count=1, flags=re.DOTALL)


def python_blocks(text: str) -> list[str]:
    return [code for language, code in FENCE.findall(text) if language == "python"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, whole_run) -> Path:
    """Where a reader stands: a clone with a run, a folder of their own text, and a file to label."""
    folder = tmp_path_factory.mktemp("reader")
    for path in ROOT.iterdir():
        if path.name not in (".git", "runs", "my", "tickets.csv", "new.csv", "news.csv", "labels.csv", "labels.jsonl"):
            (folder / path.name).symlink_to(path)
    (folder / "runs").mkdir()
    (folder / RUN).symlink_to(whole_run[0])
    (folder / "my" / "folder").mkdir(parents=True)
    rows = "".join(f"my {kind} {i} is wrong,{kind}\n" for i in range(8) for kind in ("billing", "login"))
    for name in ("my/folder/train.csv", "my/folder/test.csv", "tickets.csv"):
        (folder / name).write_text("text,label\n" + rows)
    for name in ("new.csv", "news.csv"):
        (folder / name).write_text('text\nMy password is wrong\n"Refund me, please"\n')
    return folder


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] * c.startswith(SLOW)) for c in COMMANDS if not ELSEWHERE.fullmatch(c)]
)
def test_every_command_runs(command, place, small_model, tmp_path):
    (added,) = (text for part, text in ADDED.items() if command.startswith(part))
    command += added.format(new=tmp_path / "new")
    if "--resume" in command:
        from processes import python as run_python  # here: `python -m tests.test_readme` does not find it

        stopped = tmp_path / "stopped"
        options = [*shlex.split(SHORT), stopped, "--model", small_model, "--dataset", "sample", "--checkpoint-every", "1"]
        assert run_python("-c", STOP, *options).returncode == 143
        command = command.replace(RUN, str(stopped))
    command = command.replace("--nproc-per-node 4", "--nproc-per-node 2").replace("FOLDER", "my/folder")
    started_as = [command]
    if "--nnodes 2" in command:
        command = command.replace("HOST", "127.0.0.1").replace("--nproc-per-node 2", "--nproc-per-node 1")
        started_as = [command, command.replace("--node-rank 0", "--node-rank 1")]
    python = Path(sys.executable)
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    started = [
        subprocess.Popen(["bash", "-c", c], cwd=place, env=environment, text=True, stdout=-1, stderr=-1) for c in started_as
    ]
    printed = ""
    for process in started:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        printed += out
    assert printed or ">" in command
    if "compare.py" in command and "--dataset sample" in command:  # the quoted run is longer: its words are compared
        shown, words = (re.sub(r"[\d,]+", "N", text) for text in (TEXTS["docs/experiments.md"], printed))
        first, header = words.splitlines()[:2]
        assert first in shown
        assert header.split() in [line.split() for line in shown.splitlines()]


STOP = """
import os, signal, sys
import train; from training import checkpoint
save = checkpoint.Checkpoints.save
def save_and_stop(self, step, *rest):
    save(self, step, *rest)
    if step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
checkpoint.Checkpoints.save = save_and_stop
sys.exit(train.main(sys.argv[1:]))
"""


def test_commands_are_found():
    for start in ("pip install", "python train.py", "python predict.py"):
        assert any(command.startswith(start) for command in commands(TEXTS["README.md"]))
    for document, command in {
        "docs/running.md": "torchrun",
        "docs/experiments.md": "python report.py",
        "bench/README.md": "python bench/compare_peft.py",
        "CONTRIBUTING.md": "pytest",
        "SECURITY.md": "python tests/robustness/fuzz.py",
    }.items():
        assert any(found.startswith(command) for found in commands(TEXTS[document])), document
    assert len(COMMANDS) > 15


def masked(text: str) -> list[str]:
    """Lines without what differs between machines: numbers behind a point, hashes, the name of the run."""
    text = re.sub(r"saved \S+/results", "saved RUN/results", text)
    text = re.sub(r"arithmetic in .*", "arithmetic in the faster type", text)
    text = re.sub(r" steps, about .*", " steps, about so long", text)
    return [re.sub(r"0\.\d{4}|sha256 [0-9a-f]+", "...", line.strip()) for line in text.splitlines() if line.strip()]


def quoted(document: str, beginning: str) -> list[str]:
    """The indented lines of a document from the one that begins so, masked."""
    text = TEXTS[document]
    block = re.match(r"(?:    .*\n)+", text[text.index(f"\n    {beginning}") + 1 :])
    return masked(block[0])  # type: ignore[index]


def test_the_quoted_output_of_training_is_what_it_prints(whole_run):
    printed = [line for line in masked(whole_run[1]) if "the merged model" not in line]
    assert quoted("docs/running.md", "distilbert-base-uncased") == printed


def test_the_quoted_output_of_predict_is_what_it_prints(whole_run, capsys):
    assert predict.main([str(whole_run[0]), "Oil prices rose on Monday"]) == 0
    printed = masked(capsys.readouterr().out)
    shown = quoted("docs/running.md", "Oil prices")
    assert shown[:2] == printed[:2]  # the text and its best label; the order of the others depends on the processor
    assert sorted(shown) == sorted(printed)


def test_the_line_counts_are_true():
    """Of the files and rooms that README.md lists. `python -m tests.test_readme` writes them anew."""
    text = TEXTS["README.md"]
    right = with_true_counts(text)
    wrong = [line for line, was in zip(right.splitlines(), text.splitlines(), strict=True) if line != was]
    assert not wrong, "README.md should say (python -m tests.test_readme writes it):\n" + "\n".join(wrong)


def test_every_source_is_in_the_tree_and_the_core_has_the_size_it_says():
    text = TEXTS["README.md"]
    tree, core = (COUNTED.findall(block) for _, block in FENCE.findall(text) if COUNTED.search(block))
    names = {name for _, several in tree for name in several.split()}
    rooms = {path.parent.relative_to(ROOT).as_posix() + "/" for path in ROOT.glob("*/__init__.py")}
    assert names == rooms | {path.name for path in ROOT.glob("*.py")}
    said = re.search(r"The core is (\w+) files, about (\d+) lines", text)
    assert said
    assert said[1] == {6: "six", 7: "seven", 8: "eight"}[len(core)]
    assert int(said[2]) == pytest.approx(sum(count_lines(name.strip()) for _, name in core), rel=0.1)


def test_the_quoted_forward_is_that_of_the_layer():
    assert with_true_forward(TEXTS["README.md"]) == TEXTS["README.md"]


@pytest.fixture
def short_runs(monkeypatch):
    """`fit` takes a few rows, one step and the embedded encoder, whatever the document says."""
    run = train.run
    few = {"model": "minilm", "epochs": 1, "train_limit": 16, "test_limit": 8}
    monkeypatch.setattr(train, "run", lambda options, checkpoint=None: run(dataclasses.replace(options, **few), checkpoint))


def test_the_code_runs_from_its_first_line_to_its_last(tmp_path, monkeypatch, short_runs):
    """In the documents' order, in one folder, as a reader goes through them."""
    monkeypatch.chdir(tmp_path)
    blocks = {name: python_blocks(text) for name, text in TEXTS.items()}
    assert {name: len(codes) for name, codes in blocks.items() if codes} == BLOCKS
    for code in blocks["README.md"][1:] + blocks["docs/peft.md"]:  # the first is the forward
        exec(code, names := {})
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert (tmp_path / "minilm-as-distilbert" / "model.safetensors").exists()

    code = blocks["docs/server.md"][0]
    assert "server.serve_forever()\n" in code
    exec(code.replace("8000", "0").replace("server.serve_forever()", ""), names := {})
    server = names["server"]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(lambda text: ask(server.server_address[1], [text]), ["Refund me, please", "I cannot log in"] * 4)
            )
        assert all(status == 200 for status, _ in answers)
        expected = names["classifier"].predict_proba(["Refund me, please"])[0]
        assert list(answers[0][1][0]) == ["billing", "login"]
        assert list(answers[0][1][0].values()) == pytest.approx(expected.tolist(), abs=1e-6)
        for wrong in ("text", [1], 5, None):
            status, answer = ask(server.server_address[1], wrong)
            assert (status, list(answer)) == (400, ["error"])
    finally:
        server.shutdown()
        server.server_close()


# how many blocks of Python each document has: the forward, peft and the notebook; each of the others has one
BLOCKS = {"README.md": 3, "docs/peft.md": 1, "docs/running.md": 1, "docs/server.md": 1, "docs/toy.md": 1}


def ask(port: int, texts: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/", json.dumps(texts))
    response = connection.getresponse()
    status, answer = response.status, json.loads(response.read())
    connection.close()
    return status, answer


def test_the_toy_prints_what_it_says(capsys):
    (code,) = python_blocks(TEXTS["docs/toy.md"])
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    (shown,) = re.findall(r"It prints:\n\n((?:    .*\n)+)", TEXTS["docs/toy.md"])
    assert textwrap.dedent(shown).splitlines() == printed
    assert 25 <= len(code.splitlines()) <= 32


def test_the_example_runs(tmp_path, monkeypatch, short_runs, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(ROOT / "examples" / "news.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "<Classifier of 4 classes in runs/" in printed
    assert "['Business' 'Sci/Tech' 'Sports' 'World']" in printed


@pytest.mark.slow
def test_the_exported_model_gives_the_labels_of_predict(whole_run, tmp_path, monkeypatch):
    """In ONNX Runtime, nearly all in int8, and for other numbers of texts and tokens than at the export."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[bench]'")
    monkeypatch.chdir(tmp_path)
    Path("my").mkdir()
    Path("my/model").symlink_to(whole_run[0].with_name("merged"))
    (block,) = (block for block in python_blocks(TEXTS["docs/running.md"]) if "onnx" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["logits"].shape == (2, 4)

    texts = load_dataset("sample").test.texts[:40]
    labels = [answer["label"] for answer in load_classifier(whole_run[0]).label(texts)]
    inputs = names["tokenizer"](texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    expected = names["model"](**inputs).logits.detach().numpy()
    for file, most in {"model.onnx": 1e-5, "int8.onnx": 0.6}.items():
        session = onnxruntime.InferenceSession(file)
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        assert np.abs(logits - expected).max() < most, file
        answers = [names["model"].config.id2label[i] for i in logits.argmax(axis=1)]
        assert np.mean([a == b for a, b in zip(answers, labels, strict=True)]) > 0.9, file


@pytest.mark.parametrize("document", TEXTS)
def test_every_file_and_link_that_is_named_exists(document):
    text = TEXTS[document]
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert ((ROOT / document).parent / link).exists(), link
    without_links = re.sub(r"\]\([^)]*\)", "", text)
    for path in re.findall(r"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|json|svg|toml))\b", without_links):
        if path.split("/")[-1] not in GENERATED:
            assert (ROOT / path).exists(), path
    for room in re.findall(r"`((?:lora|model|data|training|reporting|common|tests|bench|docs)/[\w/]*)`", text):
        assert (ROOT / room).is_dir(), room


@pytest.mark.slow
def test_a_newcomer_gets_from_a_clone_to_labelled_text_in_three_commands(tmp_path, place):
    """In a fresh environment, as the README has them: it installs torch, which takes minutes."""
    three = re.search(r"^    git .*\n(?:    python .*\n){2}", TEXTS["README.md"], flags=re.MULTILINE)
    assert three
    install, teach, label = three[0].splitlines()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    script = f"""
set -e
cd {tmp_path}
source venv/bin/activate
{install.replace("URL", str(ROOT))}
cp {place}/tickets.csv {place}/new.csv .
{teach} --model minilm
{label.replace(RUN, "runs/*")}
cat labels.jsonl
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    assert [answer["text"] for answer in answers] == ["My password is wrong", "Refund me, please"]
    assert {answer["label"] for answer in answers} <= {"billing", "login"}


if __name__ == "__main__":
    README.write_text(with_true_forward(with_true_counts(TEXTS["README.md"])), encoding="utf-8")
