"""A stopped run continues and ends with the same adapter, bit for bit."""

import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import begun, stop_after, unvalidated
from processes import Python, python, start_ranks
from safetensors.torch import load_file

import train
from common.errors import UserError
from train import main
from training import checkpoint
from training.artifacts import Metrics
from training.checkpoint import Checkpoints, newest_first, read_newest
from training.options import Options

STEPS = 50  # 200 examples in batches of 8, twice


@pytest.fixture(scope="module")
def words(small_model) -> list[str]:
    options = ["--train-limit", "200", "--test-limit", "20", "--batch-size", "8", "--epochs", "2", "--checkpoint-every", "2"]
    return ["--model", str(small_model), "--dataset", "sample", "--learning-rate", "3e-3", *options]


@pytest.fixture(scope="module")
def uninterrupted(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("left") / "alone"
    assert main([*words, "--output-dir", str(folder)]) == 0
    return folder


def start(*arguments: str) -> Python:
    return Python("train.py", *arguments)


def start_all(processes: int, *arguments: str) -> list[Python]:
    """The ranks of one run, one of them after the other."""
    return start_ranks([["train.py", *arguments]] * processes) if processes > 1 else [start(*arguments)]


def wait_for_step(run: Path, step: int, process: Python) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(path.stem >= f"step-{step:08}" for path in newest_first(run)):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same_result(run: Path, other: Path) -> None:
    """The adapter and the predictions byte for byte, the metrics but for the speed, and nothing left over."""
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "metrics.jsonl", "predictions.jsonl", "results.json"]
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (run, other)]
    for line in [*metrics[0], *metrics[1]]:
        del line["examples_per_second"]
    assert metrics[0] == metrics[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, other)]
    assert results[0]["before"] == results[1]["before"]
    assert results[0]["after"] == results[1]["after"]


def kill_and_resume(words: list[str], run: Path, kills: int, processes: int, steps: int = STEPS, last: bool = True) -> None:
    """Start the run and kill it `kills` times at random moments. Then, if `last`, let it end."""
    rng = random.Random(0)
    arguments, done = [*words, "--output-dir", str(run)], 0
    for number in range(kills):
        started = start_all(processes, *arguments)
        done = max([done, *(int(path.stem[5:]) for path in newest_first(run))])
        wait_for_step(run, min(done + 2 * (1 + number % 2), steps - 2), started[0])
        time.sleep(rng.uniform(0, 0.03))
        for process in started:
            process.kill()
        for process in started:
            process.wait(60)
        assert not (run / "results.json").exists()
        arguments = ["--resume", str(run)]
    if not last:
        return
    for process in start_all(processes, *arguments):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_a_run_killed_again_and_again_ends_the_same(words, uninterrupted, tmp_path):
    kill_and_resume(words, tmp_path / "run", kills=2, processes=1)
    assert_same_result(tmp_path / "run", uninterrupted)


@pytest.fixture(scope="module")
def two_uninterrupted(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "alone"
    kill_and_resume(words, folder, kills=0, processes=2)
    return folder


@pytest.mark.slow
def test_two_killed_processes_end_the_same(words, two_uninterrupted, tmp_path):
    kill_and_resume(words, tmp_path / "run", kills=1, processes=2)
    assert_same_result(tmp_path / "run", two_uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills(processes, words, tmp_path):
    words = [*words, "--epochs", "12"]  # 300 steps
    for run, kills in [("alone", 0), ("run", 20)]:
        kill_and_resume(words, tmp_path / run, kills, processes, steps=300)
    assert_same_result(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("moment", ["half of it is on disk", pytest.param("it is not renamed yet", marks=pytest.mark.slow)])
def test_a_kill_while_writing_a_checkpoint_loses_only_that_one(moment, words, uninterrupted, tmp_path):
    run = tmp_path / "run"
    program = f"""
import os, signal, sys
from pathlib import Path
import train; from common import files

write_bytes = Path.write_bytes
def half(path, content):
    if "step-00000024" in path.name:
        write_bytes(path, content[:len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write_bytes(path, content)

replace = os.replace
def never(old, new):
    if "step-00000024" in str(new):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)

if {moment!r} == "half of it is on disk":
    Path.write_bytes = half
else:
    os.replace = never
train.main(sys.argv[1:])
"""
    assert python("-c", program, *words, "--output-dir", run).returncode == -signal.SIGKILL
    assert [path.name for path in newest_first(run)] == ["step-00000022.safetensors", "step-00000020.safetensors"]
    assert list((run / "checkpoints").glob(".*"))
    assert main(["--resume", str(run)]) == 0
    assert_same_result(run, uninterrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_resume(number, status, words, uninterrupted, tmp_path):
    run = tmp_path / "run"
    words = [*words[: words.index("--checkpoint-every")], "--checkpoint-every", "1000"]
    process = start(*words, "--output-dir", str(run))
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"stopped by {number.name}. To continue: python train.py --resume {run}" in errors
    assert "Traceback" not in errors
    assert read_newest(run).step >= 10  # and not only the one of the start
    assert main(["--resume", str(run)]) == 0
    assert_same_result(run, uninterrupted)


def test_two_processes_stop_after_the_same_step(words, tmp_path):
    run = tmp_path / "run"
    first, second = start_all(2, *words, "--epochs", "40", "--output-dir", str(run))
    wait_for_step(run, 10, first)
    second.send_signal(signal.SIGTERM)  # one of them is told
    assert [process.wait(60) for process in (first, second)] == [143, 143]
    assert read_newest(run).step >= 10


@pytest.fixture(scope="module")
def killed(words, tmp_path_factory) -> Path:
    """A run with two checkpoints, of steps 22 and 20, and half of a third."""
    run = tmp_path_factory.mktemp("killed") / "run"
    program = "import os, sys, train; from common import files; replace = os.replace\n"
    program += "os.replace = lambda old, new: os._exit(9) if 'step-00000024' in str(new) else replace(old, new)\n"
    program += "train.main(sys.argv[1:])"
    assert python("-c", program, *words, "--output-dir", run).returncode == 9
    return run


@pytest.fixture
def stopped(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_a_damaged_checkpoint_is_skipped(stopped, uninterrupted, capsys, tmp_path):
    newest, other = newest_first(stopped)
    whole = newest.read_bytes()
    rng = random.Random(0)
    for damaged in [b"", whole[:1000], whole[:-1], *(flip(whole, rng.randrange(len(whole))) for _ in range(200))]:
        newest.write_bytes(damaged)
        assert read_newest(stopped).path == other
        assert str(newest) in capsys.readouterr().out
    assert main(["--resume", str(stopped)]) == 0
    assert_same_result(stopped, uninterrupted)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def test_without_an_undamaged_checkpoint_resume_is_refused(stopped):
    for path in newest_first(stopped):
        path.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints can be used. Start the run again"):
        read_newest(stopped)
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint to resume from"):
        read_newest(stopped)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--r", "4"], "--r is 4, but the run in .* began with 2"),
        (["--seed", "1"], "--seed is 1, but the run in .* began with 0"),
        (["--use-dora"], "--use-dora is True, but the run in .* began with False"),
        (["--target-modules", "q_lin"], r"--target-modules is \['q_lin'\], but the run in .* began with \['q_lin', 'v_lin'\]"),
        (["--output-dir", "elsewhere"], "--output-dir is elsewhere, but the run in .* began with .*run"),
    ],
)
def test_an_option_that_contradicts_the_run_is_refused(typed, message, stopped, capsys):
    assert main(["--resume", str(stopped), *typed]) == 2
    assert len(errors := capsys.readouterr().err.splitlines()) == 1
    assert re.search(message, errors[0])


def test_other_data_model_or_number_of_processes_is_refused(stopped, tmp_path):
    newest = read_newest(stopped)
    with pytest.raises(UserError, match=r"number of processes: 1 in .*, 2 now"):
        newest.refuse_changes(2, newest.fingerprint)
    for what in ("the model", "the data", "--dtype"):
        with pytest.raises(UserError, match=f"{what} has changed since the run"):
            newest.refuse_changes(1, newest.fingerprint | {what: "another"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_keeps_its_arithmetic(dtype, words, tmp_path, monkeypatch, capsys):
    """Though the measurement would now choose the other one."""
    run, words = tmp_path / "run", [*words, "--train-limit", "32", "--epochs", "1"]  # 4 steps
    stop_after(monkeypatch, 2)
    monkeypatch.setattr(train, "choose_dtype", lambda name, device: (dtype, "chosen by the test"))
    assert main([*words, "--output-dir", str(run)]) == 143
    monkeypatch.undo()
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(train, "choose_dtype", lambda name, device: (other, "chosen by the test"))
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 0
    name = str(dtype).removeprefix("torch.")
    assert f"arithmetic in {name} (as before)" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())["dtype"] == name


def test_an_ended_run_is_not_resumed(uninterrupted, capsys):
    assert main(["--resume", str(uninterrupted)]) == 2
    assert "has ended: results.json exists" in capsys.readouterr().err


def test_options_without_influence_on_the_result_may_change(stopped, tmp_path):
    newest = read_newest(stopped)
    options = newest.resume_options({"r": 2, "target_modules": ["q_lin", "v_lin"], "checkpoint_every": 7})
    assert options == dataclasses.replace(Options(**newest.options), checkpoint_every=7)


def test_a_loss_that_is_not_finite_stops_the_run(words, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*words, "--learning-rate", "1e25", "--dtype", "float32", "--output-dir", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"(loss|gradient) is (nan|inf) at step \d+, on the training examples (\d+, ){7}\d+ .* with --learning-rate 1e\+25",
        error,
    )
    assert not (run / "adapter").exists()
    for path in newest_first(run):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.parametrize(("largest", "what"), [(6_000, "step-00000000.safetensors"), (60_000, "adapter")])
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(largest, what, words, tmp_path):
    run = tmp_path / "run"
    small_disk = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
    done = python("train.py", *words, "--output-dir", run, before=small_disk)
    assert done.returncode == 2
    assert f"{what} cannot be written: File too large" in done.stderr.splitlines()[-1]
    assert not list(run.rglob(".*"))
    if what == "adapter":
        assert read_newest(run).step == STEPS  # nothing is lost: with more room, the run can continue from here


def test_checkpoints_take_at_most_one_percent_of_the_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, None, {}, write=True)
    assert not checkpoints.due(1)
    now = 31.0
    assert checkpoints.due(2)
    checkpoints.cost = 0.5
    assert not checkpoints.due(2)
    now = 51.0
    assert checkpoints.due(3)
    assert [step for step in range(1, 10) if Checkpoints(tmp_path, 3, {}, write=True).due(step)] == [3, 6, 9]


def test_two_checkpoints_are_kept(tmp_path):
    checkpoints = begun(tmp_path)
    for step in range(5):
        checkpoints.save(step, 0.0, [])
    assert [path.name for path in newest_first(tmp_path)] == ["step-00000004.safetensors", "step-00000003.safetensors"]
    assert safetensors.torch.load_file(newest_first(tmp_path)[0]).keys() == {
        *(
            "weight",
            "weight/step",
            "weight/exp_avg",
            "weight/exp_avg_sq",
            "bias",
            "bias/step",
            "bias/exp_avg",
            "bias/exp_avg_sq",
        )
    }


def test_a_second_process_on_the_same_run_is_refused(words, uninterrupted, tmp_path):
    run = tmp_path / "run"
    first = start(*words, "--output-dir", str(run))
    wait_for_step(run, 2, first)
    first.send_signal(signal.SIGSTOP)
    second = start("--resume", str(run))
    _, errors = second.communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert errors.splitlines()[-1] == (f"train.py: another process uses the run folder {run}. Wait for it, or end it")
    assert first.wait(60) == 0
    assert_same_result(run, uninterrupted)


def test_two_runs_in_the_same_folder_do_not_mix(tmp_path):
    first, second = (Checkpoints(tmp_path, 1, {}, write=True) for _ in range(2))
    first.clean(0)
    with pytest.raises(UserError, match="another process uses the run folder"):
        second.clean(0)
    del first
    second.clean(0)  # who is gone holds no lock
    del second
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="another run has ended in"):
        Checkpoints(tmp_path, 1, {}, write=True).clean(0)


@pytest.mark.slow
def test_processes_with_different_checkpoints_are_refused(words, tmp_path):
    kill_and_resume(words, tmp_path / "run", kills=1, processes=2, last=False)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    newest_first(tmp_path / "other")[0].unlink()
    for process in start_ranks([["train.py", "--resume", tmp_path / name] for name in ("run", "other")]):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "the checkpoint differs between processes 0 and 1" in errors


def test_a_skipped_checkpoint_is_removed(stopped):
    newest, other = newest_first(stopped)
    newest.write_bytes(b"damaged")
    newest = read_newest(stopped)
    Checkpoints(stopped, 1, {}, write=True, resume_from=newest).clean(newest.step)
    assert newest_first(stopped) == [other]


def test_a_damaged_line_of_metrics_is_named(stopped):
    metrics = stopped / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"step": 2')
    checkpoints = Checkpoints(stopped, 1, {}, write=True)
    Metrics(checkpoints, 22, tensorboard=False)
    assert metrics.read_bytes() == whole
    for damaged in (b"{}\n", b"\0\0}\n", b"[]\n", b"\xff\n"):
        metrics.write_bytes(whole + damaged)
        with pytest.raises(UserError, match=rf"metrics.jsonl, line {1 + whole.count(bytes([10]))}: not a line of metrics"):
            Metrics(checkpoints, 22, tensorboard=False)
        assert metrics.read_bytes() == whole + damaged


@pytest.mark.parametrize("changed", [{"options": {"frobnicate": 1}}, {"options": {"epochs": -1}}, {"more": 1}])
def test_a_checkpoint_of_another_version_is_skipped(changed, killed, tmp_path, capsys):
    newest = read_newest(killed)
    fields = {item.name: getattr(newest, item.name) for item in dataclasses.fields(newest)[2:]}  # without path and tensors
    state = json.dumps(fields | changed)
    tensors = {key: tensor.bfloat16() for key, tensor in newest.tensors.items()}
    (tmp_path / "checkpoints").mkdir()
    metadata = {"state": state, "sha256": checkpoint.sha256(state, tensors)}
    safetensors.torch.save_file(tensors, tmp_path / "checkpoints" / "step-00000001.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        read_newest(tmp_path)
    assert "comes from another version of this program" in capsys.readouterr().out


def test_the_state_of_another_optimizer_is_refused(killed):
    """Not a KeyError in the first step."""
    checkpoint = read_newest(killed)
    layer = torch.nn.Linear(2, 2)
    tensors = {"weight": layer.weight, "bias": layer.bias, "weight/mean": layer.weight}
    with pytest.raises(UserError, match="comes from another version of this program"):
        dataclasses.replace(checkpoint, tensors=tensors).restore(
            layer, torch.optim.AdamW(layer.parameters()), unvalidated(layer)
        )


def test_files_are_flushed_before_they_replace_others(tmp_path, monkeypatch):
    happened = []
    checkpoints = begun(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, 0.0, [])
    replace, fsync, unlink = os.replace, os.fsync, Path.unlink

    def note(what: str, do):
        def noted(*arguments, **options):
            path = arguments[0]
            name = Path(f"/proc/self/fd/{path}").readlink().name if isinstance(path, int) else Path(path).name
            happened.append((what, re.sub(r"\.[0-9a-f]{8}\.partial", ".partial", name)))
            return do(*arguments, **options)

        return noted

    monkeypatch.setattr(os, "replace", note("rename", replace))
    monkeypatch.setattr(os, "fsync", note("flush", fsync))
    monkeypatch.setattr(Path, "unlink", note("remove", unlink))
    checkpoints.save(3, 0.0, [])
    partial = ".step-00000003.safetensors.partial"
    assert [(what, name) for what, name in happened if (what, name) != ("remove", partial)] == [
        ("flush", partial),
        ("rename", partial),
        ("flush", "checkpoints"),
        ("remove", "step-00000001.safetensors"),
    ]
    happened.clear()
    Metrics(checkpoints, 3, tensorboard=False).write(4, loss=1.0)
    assert happened == [("flush", "metrics.jsonl")]
