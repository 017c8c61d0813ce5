"""Where results go: nothing of others is overwritten or removed, and what a killed process left is not in the way."""

import ast
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import begun

import compare
import predict
import report
from common.errors import UserError
from common.files import locked, new_file, new_folder, refuse_to_overwrite, write_file
from training.artifacts import Metrics, check_outputs
from training.checkpoint import Checkpoints, newest_first, read_newest
from training.distributed import VARIABLES, Distributed
from training.model_card import model_card
from training.options import Options

FAULTS = Path(__file__).with_name("faults.py")
LEFT = ".{}.0a1b2c3d.partial"  # as a killed process leaves it


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The folder of a run that has ended, for a report whose page is one word."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("reporting.sections.report_page", lambda folder, against: "page")
    for name in ("results.json", "metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoints/step-00000001.safetensors"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("precious")
    return tmp_path / "run"


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# A file


def test_a_report_is_written_through_links_and_pipes(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for _ in range(2):  # the target is new, then it exists
        assert report.main([str(run), "--output", str(tmp_path / "link")]) == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == "page"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    try:
        assert report.main([str(run), "--output", str(tmp_path / "pipe")]) == 0
        assert reader.communicate(timeout=10)[0] == "page"
    finally:
        reader.kill()
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_what_the_shell_has_opened_is_written_to_and_not_replaced(run, tmp_path):
    """`report.py RUN --output /dev/stdout >> log`"""
    (tmp_path / "log").write_text("before, ")
    with open(tmp_path / "log", "a") as log:
        assert report.main([str(run), "--output", f"/dev/fd/{log.fileno()}"]) == 0
    assert (tmp_path / "log").read_text() == "before, page"
    with (
        open(tmp_path / "log") as log,
        pytest.raises(UserError, match="is not a file"),
        new_file(Path(f"/dev/fd/{log.fileno()}")),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs Linux")
def test_a_file_in_dev_shm_is_a_file():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for page in (b"first", b"second"):
            write_file(Path(folder) / "new" / "page", page)
        with new_file(Path(folder) / "labels") as file:
            file.write("x")
        assert files(Path(folder)) == {"new/page": "second", "labels": "x"}


@pytest.mark.parametrize(
    "what",
    ["results.json", "metrics.jsonl", "predictions.jsonl", "adapter/x", "adapter/adapter_model.safetensors", "link", "."],
)
@pytest.mark.parametrize("option", [None, "--against"])
def test_a_report_does_not_overwrite_the_files_of_a_run(run, what, option, tmp_path, capsys):
    (run / "link").symlink_to("results.json")
    before = files(run)
    arguments = [str(run)] if option is None else [str(tmp_path / "other"), option, str(run)]
    assert report.main([*arguments, "--output", str(run / what)]) == 2
    assert f"would overwrite files of the run in {run}" in capsys.readouterr().err
    assert files(run) == before


def test_labels_do_not_overwrite_the_files_of_a_run(run, tmp_path, capsys):
    (tmp_path / "texts.csv").write_text("text\na\n")
    before = files(run)
    assert predict.main([str(run), "--input", str(tmp_path / "texts.csv"), "--output", str(run / "metrics.jsonl")]) == 2
    assert f"would overwrite files of the run in {run}" in capsys.readouterr().err
    assert files(run) == before


def test_an_output_path_that_is_a_loop_of_links_is_refused_and_kept(run, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert report.main([str(run), "--output", str(tmp_path / "loop")]) == 2
    assert "cannot be written: Too many levels of symbolic links" in capsys.readouterr().err
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        refuse_to_overwrite(tmp_path / "loop")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        check_outputs(tmp_path / "new", Options(merged_output=str(tmp_path / "loop")), new=True)
    assert (tmp_path / "loop").is_symlink()


def test_processes_that_write_the_same_file_at_once_do_not_disturb_each_other(tmp_path):
    failed, pages = [], [bytes([65 + i]) * 10_000 for i in range(4)]

    def write(page: bytes) -> None:
        try:
            for _ in range(25):
                write_file(tmp_path / "report.html", page)
        except UserError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(page,)) for page in pages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (tmp_path / "report.html").read_bytes() in pages
    assert os.listdir(tmp_path) == ["report.html"]


def test_permissions_are_kept(tmp_path):
    (tmp_path / "report.html").touch(mode=0o600)
    write_file(tmp_path / "report.html", b"page")
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o600
    for name in ("merged", "parent"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o2770)
    for name in ("merged", "parent/merged"):
        with new_folder(tmp_path / name) as folder:
            write_file(folder / "file", b"")
        assert (tmp_path / name).stat().st_mode & stat.S_ISGID
    assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == 0o2770
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "merged" / "file").stat().st_mode) == 0o666 & ~umask


# A folder


@pytest.mark.parametrize("name", ["checkpoints/m", "checkpoints", "adapter/x/y", "tensorboard/m", "results.json", "x/..", ".."])
def test_a_merged_model_does_not_go_where_the_run_writes(run, name, tmp_path):
    (tmp_path / "by_link").symlink_to("run")
    for folder in (run, tmp_path / "by_link"):
        with pytest.raises(UserError, match="would overwrite files of the run"):
            check_outputs(run, Options(merged_output=str(folder / name)), new=False)


def test_a_merged_model_goes_through_a_link_and_beside_the_files_of_a_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("elsewhere")
    for name, where in (("link", "empty"), ("dangling", "elsewhere"), ("run/merged", "run/merged")):
        check_outputs(tmp_path / "run", Options(merged_output=str(tmp_path / name)), new=name != "run/merged")
        with new_folder(tmp_path / name) as new:
            (new / "model").write_text("whole")
        assert (tmp_path / where / "model").read_text() == "whole"
    assert (tmp_path / "link").is_symlink()


def test_a_folder_is_written_again_only_with_the_same_content(tmp_path):
    def write(content: str | None) -> None:
        with new_folder(tmp_path / "adapter") as new:
            if content is not None:
                (new / "weights").write_text(content)

    write("same")
    write("same")
    for content in ("other", None):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            write(content)
    assert files(tmp_path) == {"adapter/weights": "same"}


def test_what_a_killed_writer_of_a_folder_left_is_removed_by_the_next_one(tmp_path):
    left, of_others = tmp_path / LEFT.format("merged"), [tmp_path / LEFT.format("other"), tmp_path / ".merged.mine"]
    for folder in (left, *of_others):
        folder.mkdir()
        (folder / "weights").write_text("")
    with locked(left), new_folder(tmp_path / "merged"):  # its process lives
        assert left.exists()
    shutil.rmtree(tmp_path / "merged")
    with new_folder(tmp_path / "merged"):
        assert not left.exists()
    assert all(folder.exists() for folder in of_others)


def test_what_a_killed_writer_of_a_file_left_is_removed_by_the_next_one(tmp_path):
    (tmp_path / LEFT.format("labels.csv")).write_text("half of it")
    with new_file(tmp_path / "labels.csv") as first:
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        first.write("first")
        with new_file(tmp_path / "labels.csv") as second:  # of another process: both live
            second.write("second")
    assert files(tmp_path) == {"labels.csv": "first"}


# The folder of a run


def checkpoints_of(run: Path, *steps: int) -> Checkpoints:
    checkpoints = begun(run)
    for step in steps:
        checkpoints.save(step, 0.0, [])
    return checkpoints


def test_a_resumed_run_removes_only_what_it_made(tmp_path):
    checkpoints_of(tmp_path, 1, 2)
    own = [LEFT.format(name) for name in ("metrics.jsonl", "predictions.jsonl", "results.json")]
    own += ["checkpoints/" + LEFT.format("step-00000003.safetensors")]
    others = ["model/a", "adapter/a", ".adapter.mine/a", ".git/a", ".mine.partial", "notes/.a.partial", "checkpoints/a"]
    others += [LEFT.format("mine"), "checkpoints/step-best.safetensors"]
    for name in own + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    Checkpoints(tmp_path, 1, {}, write=True).clean(1)
    assert [path.stem for path in newest_first(tmp_path)] == ["step-00000001"]
    assert all((tmp_path / name).exists() for name in others)
    assert not any((tmp_path / name).exists() for name in own)


def test_a_run_that_begins_again_from_its_first_checkpoint_has_no_metrics_twice(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    Metrics(checkpoints, 0, tensorboard=False).write(10, loss=1.0)
    Metrics(checkpoints, 0, tensorboard=False).write(10, loss=1.0)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10, "loss": 1.0}\n'


def test_a_run_does_not_write_into_another_that_took_its_place(tmp_path):
    run = tmp_path / "run"
    paused = checkpoints_of(run, 1, 2)
    metrics = Metrics(paused, 0, tensorboard=False)
    metrics.write(1)
    shutil.rmtree(run)
    other = checkpoints_of(run, 3, 4)
    before = sorted(run.rglob("*"))
    for write in (
        lambda: metrics.write(2),
        lambda: paused.save(5, 0.0, []),
        lambda: paused.path("adapter"),
    ):
        with pytest.raises(UserError, match="its folder was removed, and this is another one"):
            write()
    assert sorted(run.rglob("*")) == before
    other.path("adapter")


def test_a_new_run_does_not_take_over_the_checkpoints_of_another(tmp_path):
    checkpoints_of(tmp_path, 1)
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        checkpoints_of(tmp_path)
    assert newest_first(tmp_path)[0].stem == "step-00000001"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    left = tmp_path / "run" / "checkpoints" / LEFT.format("step-00000000.safetensors")
    left.write_text("half of it")
    with pytest.raises(UserError, match="has no checkpoint to resume from"):
        read_newest(tmp_path / "run")
    check_outputs(tmp_path / "run", Options(), new=True)
    checkpoints_of(tmp_path / "run")
    assert not left.exists()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        check_outputs(tmp_path / "run", Options(), new=True)


def test_checkpoints_of_a_run_that_was_killed_after_its_results_are_removed_by_a_resume(tmp_path):
    checkpoints_of(tmp_path, 1, 2)
    others = [tmp_path / "checkpoints" / "a", tmp_path / "results.json"]
    for path in [*others, tmp_path / "checkpoints" / LEFT.format("step-00000003.safetensors")]:
        path.write_text("{}")
    with pytest.raises(UserError, match=r"has ended: results\.json exists"):
        read_newest(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == others


def test_a_checkpoint_that_may_not_be_read_is_neither_skipped_nor_removed(tmp_path, monkeypatch):
    checkpoints_of(tmp_path, 1, 2)
    newest = newest_first(tmp_path)[0]
    newest.write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: path != newest)  # the tests may be run by root, who may read all
    with pytest.raises(UserError, match="safetensors cannot be read"):
        read_newest(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
        read_newest(tmp_path)


def test_tensorboard_on_a_full_disk_is_one_line(tmp_path, capfd):
    metrics = Metrics(checkpoints_of(tmp_path), 0, tensorboard=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        for step in range(5):
            metrics.write(step, x=1.0)

    resource.setrlimit(resource.RLIMIT_FSIZE, (250, limits[1]))
    try:
        with pytest.raises(UserError, match="tensorboard cannot be written: File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err == ""


RESULTS = {
    "dataset": "sample",
    "sha256": {},
    "options": {"method": "lora", "r": 2, "lora_alpha": 16.0, "target_modules": ["q_lin"]}
    | {"batch_size": 1, "learning_rate": 1e-3, "seed": 0},
    "before": {"macro_f1": 0.1, "accuracy": 0.1},
    "after": {"macro_f1": 0.1, "accuracy": 0.1, "confusion_matrix": [[1]], "per_class_f1": {"a": 0.1}},
    "parameters": {"trainable": 1, "all": 2},
    "train": {"examples": 1, "steps": 1},
    "dtype": "float32",
}


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("name", ["a: b", "C: x", "@x", "- x", "x # y", 'a"b', "C:\\x", "distilbert: {x}"])
def test_a_model_card_can_be_read_whatever_the_name_of_the_model(name, is_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if is_folder:
        (tmp_path / name).mkdir()
    _, header, text = model_card(RESULTS | {"model": name}).split("---\n", 2)
    known = yaml.safe_load(header)
    assert known.get("base_model") == (None if is_folder else name)
    assert known["model-index"][0]["name"] == f"LoRA on {name} for sample"
    code = ast.unparse(ast.parse(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]))
    assert is_folder or repr(name) in code


# Processes


@pytest.mark.parametrize("name", ["no.such.host.invalid", "x" * 70 + ".org", "300.1.1.1", "a b"])
def test_a_main_process_on_a_machine_that_cannot_be_found_is_refused_at_once(name, monkeypatch):
    for variable, value in zip(VARIABLES, ("1", "2", "0", "1", "29500", name), strict=True):
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *arguments, **options: pytest.fail("waits"))
    with pytest.raises(UserError, match=r"MASTER_ADDR is .* cannot be found from here"):
        Distributed().join(torch.device("cpu"))


@pytest.mark.parametrize(
    "environment",
    [
        "RANK=1",
        "RANK=0",
        "WORLD_SIZE=2",
        "LOCAL_RANK=0",
        "RANK=abc WORLD_SIZE=1",
        "RANK=-1 WORLD_SIZE=1",
        "RANK=0 WORLD_SIZE=0",
        "RANK= WORLD_SIZE=1",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR= MASTER_PORT=29500",
        *(f"RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT={port}" for port in ("0", "x", "65536", "-1", "29500.0")),
        "RANK=2 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500",
        "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 LOCAL_RANK=x",
        "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 LOCAL_WORLD_SIZE=3",
    ],
)
def test_variables_that_torchrun_would_not_set_are_refused_together(environment, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for word in environment.split():
        monkeypatch.setenv(*word.split("=", 1))
    with pytest.raises(UserError, match="Start with torchrun, or unset") as refusal:
        Distributed()
    assert all(word.split("=")[0] in str(refusal.value) for word in environment.split())


def test_variables_that_torchrun_sets_are_taken(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
        assert (Distributed().rank, Distributed().world_size) == (0, 1)  # a cluster may set these two for everybody
    for values in (("3", "4", "1", "2"), ("1", "2", "0", "1")):
        for name, value in zip(VARIABLES, values, strict=False):
            monkeypatch.setenv(name, value)
        assert (Distributed().rank, Distributed().world_size) == tuple(map(int, values[:2]))


TRAIN = """
import os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
def stop(*_):
    time.sleep(0.2)
    (here / "checkpoint").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(here / "new").write_text(str(os.getpid()))
(here / "new").rename(here / "pid")
time.sleep(60)
"""


def test_a_signal_to_compare_ends_its_training_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "compare.py"))

    def stop() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("compare.py does not handle SIGTERM"))
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        assert compare.main(["--output-dir", str(tmp_path / "out")]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
        thread.join()
        pid = int((tmp_path / "pid").read_text())
        is_running = Path(f"/proc/{pid}").exists()
        if is_running:
            os.kill(pid, signal.SIGKILL)
    assert not is_running
    assert (tmp_path / "checkpoint").exists()  # it had time to write it
    assert "compare.py: stopped by SIGTERM" in capsys.readouterr().err


def test_standard_output_that_is_closed_from_the_start_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert predict.main([str(tmp_path / "nothing here"), "a text"]) == 2
    assert capsys.readouterr().err.startswith("predict.py: standard output is closed")
    assert report.main([str(run)]) == 0  # its answer is the page
    assert (run / "report.html").read_text() == "page"


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_a_fault_at_a_file_operation_costs_nothing():
    """A slice of `python tests/robustness/faults.py`."""
    few = ["--every", "260", "--kinds", "kill"]
    done = subprocess.run([sys.executable, FAULTS, *few], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\n\d+ faults, each resumed to the same result", done.stdout)
