"""README.md is true: its commands run, its code runs, its line counts and its printed output are what they are."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lora import LoraConfig, get_peft_model
from model import load_pretrained

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("lora", "model", "data", "training", "reporting", "common")
RUN = "runs/2026-11-24-152310"  # as the README calls one
FOUND = re.findall(r"^    ((?:python|pip|torchrun|git|hf) .*)$|`((?:python|pip) [^`]+)`", README, flags=re.MULTILINE)
COMMANDS = list(dict.fromkeys(re.sub("^pip install .* && ", "", "".join(found)) for found in FOUND))
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHORT = "--model minilm --train-limit 32 --test-limit 16 --epochs 1 --output-dir"
# a part of the command -> what is added to it here, so that it is over soon
ADDED = {
    "python train.py --dataset": f" {SHORT} {{new}}",
    "python train.py --help": "",
    "python train.py --model minilm": f" {SHORT} {{new}}",
    "python train.py --resume": "",
    "python predict.py": "",
    "python report.py": "",
    "python compare.py": " --train-limit 32 --test-limit 16 --epochs 1 --output-dir {new}",
    "python bench/": " --tiny --output {new}",
    "torchrun": f" {SHORT} {{new}} --dataset sample",
}
# run elsewhere: the installation below, slowly; `python train.py` by conftest.py; break_it.py, which wants git's list of files,
# by test_break_it.py; this very suite; an upload wants an account
ELSEWHERE = re.compile("pip install .*|git clone .*|python train.py|python tests/robustness/break_it.py|pytest|hf upload .*")
SLOW = ("python bench/", "torchrun", "python compare.py", "python train.py --model")


@pytest.fixture(scope="module")
def place(tmp_path_factory, whole_run) -> Path:
    """Where the README's reader stands: a clone with a run, a folder of their own text, and a file to label."""
    folder = tmp_path_factory.mktemp("reader")
    for path in ROOT.iterdir():
        if path.name not in (".git", "runs"):
            (folder / path.name).symlink_to(path)
    (folder / "runs").mkdir()
    (folder / RUN).symlink_to(whole_run[0])
    (folder / "my" / "folder").mkdir(parents=True)
    for name in ("train", "test"):
        rows = "".join(f"report {i} of the {kind},{kind}\n" for i in range(8) for kind in ("match", "market"))
        (folder / "my" / "folder" / f"{name}.csv").write_text("text,label\n" + rows)
    (folder / "news.csv").write_text('text\nOil prices rose on Monday\n"The cup final, at last"\n')
    return folder


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] * c.startswith(SLOW)) for c in COMMANDS if not ELSEWHERE.fullmatch(c)]
)
def test_every_command_runs(command, place, tmp_path):
    (added,) = (text for part, text in ADDED.items() if command.startswith(part))
    command += added.format(new=tmp_path / "new")
    if "--resume" in command:
        stopped = tmp_path / "stopped"
        options = shlex.split(f"{SHORT} {stopped} --dataset sample --checkpoint-every 1")
        assert subprocess.run([sys.executable, "-c", STOP, *options], cwd=ROOT, capture_output=True).returncode == 143
        command = command.replace(RUN, str(stopped))
    command = command.replace("--nproc-per-node 4", "--nproc-per-node 2").replace("FOLDER", "my/folder")
    commands = [command]
    if "--nnodes 2" in command:
        command = command.replace("HOST", "127.0.0.1").replace("--nproc-per-node 2", "--nproc-per-node 1")
        commands = [command, command.replace("--node-rank 0", "--node-rank 1")]
    python = Path(sys.executable)
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    started = [
        subprocess.Popen(["bash", "-c", c], cwd=place, env=environment, text=True, stdout=-1, stderr=-1) for c in commands
    ]
    printed = ""
    for process in started:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        printed += out
    assert printed or ">" in command


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
    assert len(COMMANDS) > 10
    assert any(command.startswith("python report.py") for command in COMMANDS)


def masked(text: str) -> list[str]:
    """Lines without what differs from machine to machine: numbers behind a point, hashes, the name of the run."""
    text = re.sub(r"saved \S+/results", "saved RUN/results", text)
    return [re.sub(r"0\.\d{4}|sha256 [0-9a-f]+", "...", line.strip()) for line in text.splitlines() if line.strip()]


def test_the_printed_output_is_what_a_run_prints(whole_run):
    printed = masked(whole_run[1])
    start = README.index("    distilbert-base-uncased is not on this machine")
    shown = masked(re.match(r"(?:    .*\n)+", README[start:])[0])  # type: ignore[index]
    assert shown == [line for line in printed if "the merged model" not in line]


def test_the_table_of_files_names_every_one_with_its_number_of_lines():
    listed = {name: int(lines) for lines, name in re.findall(r"^ *(\d+)  (\S+\.py) ", README, flags=re.MULTILINE)}
    sources = [*ROOT.glob("*.py"), *(path for part in FOLDERS for path in (ROOT / part).glob("*.py"))]
    counted = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    counted = {name: lines for name, lines in counted.items() if not name.endswith("__init__.py")}
    assert {name: lines for name, lines in listed.items() if not name.startswith("tests/")} == counted
    for name in listed.keys() - counted.keys():
        assert listed[name] == len((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_the_code_of_the_idea_is_the_code_of_the_layer():
    code = "".join(f"    {line}" if line.strip() else line for line in BLOCKS[0].splitlines(keepends=True))
    assert code in (ROOT / "lora" / "layer.py").read_text(encoding="utf-8")


def test_the_other_code_runs_from_its_first_line_to_its_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, _ = load_pretrained("minilm", 4)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_lin"])).save_pretrained("another")
    for block in BLOCKS[1:]:
        exec(block, {})
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert (tmp_path / "minilm-as-distilbert" / "model.safetensors").exists()


def test_every_file_and_link_that_is_named_exists():
    for name in re.findall(r"`((?:[\w/]+/)?[\w]+\.(?:py|md|json|svg))`|\]\(((?!http)[^)]+)\)", README):
        path = next(filter(None, name))
        if path.split("/")[-1] not in GENERATED:
            assert (ROOT / path).exists(), path


GENERATED = ("results.json", "label_names.json", "adapter_config.json", "tokenizer.json", "config.json")


@pytest.mark.slow
def test_a_newcomer_gets_from_a_clone_to_labelled_text_in_four_commands(tmp_path, place):
    """In a fresh environment, as the README has them: it installs torch, which takes minutes."""
    four = re.search(r"(?:^    (?:git|pip|python) .*\n){4}", README, flags=re.MULTILINE)
    assert four
    first, install, teach, label = four[0].splitlines()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    script = f"""
set -e
cd {tmp_path}
source venv/bin/activate
{first.replace("URL", str(ROOT))}
mkdir my && cp -r {place}/my/folder my/folder && cp {place}/news.csv .
{install}
{teach} --model minilm
{label.replace(RUN, "runs/*")}
cat labels.jsonl
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    assert [answer["text"] for answer in answers] == ["Oil prices rose on Monday", "The cup final, at last"]
    assert {answer["label"] for answer in answers} <= {"match", "market"}
