"""Disks that are full or read-only, and folders that vanish: one line, status 2, nothing lost."""
# ruff: noqa: F811

import contextlib
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import Python, python
from test_checkpoint import STEPS, assert_same_result, start, uninterrupted, wait_for_step, words  # noqa: F401

from common.errors import UserError
from common.files import new_folder
from train import main
from training.checkpoint import newest_first, read_newest


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a size that can be chosen, and changed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def of_size(kilobytes: int) -> Path:
        mount(*(["-o", f"remount,size={kilobytes}k", place] if place.is_mount() else mount_options(kilobytes)))
        return place

    def mount_options(kilobytes: int) -> list[str]:
        return ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]

    if shutil.which("mount") is None:
        pytest.skip("no file system can be mounted here")
    yield of_size
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", place], check=True, capture_output=True)


def in_one_line(done: subprocess.CompletedProcess | Python, errors: str, says: str) -> None:
    assert done.returncode == 2, errors
    last = errors.splitlines()[-1]
    assert last.startswith("train.py: ")
    assert says in last
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("kilobytes", "what"),
    [
        (8, "step-00000000.safetensors"),
        pytest.param(60, "step-0000000", marks=pytest.mark.slow),
        pytest.param(230, "adapter", marks=pytest.mark.slow),
        pytest.param(800, "merged", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_after_a_full_disk_has_room_again(kilobytes, what, words, uninterrupted, small_disk):
    disk = small_disk(kilobytes)
    process = start(*words, "--output-dir", str(disk / "run"), "--merged-output", str(disk / "merged"))
    _, errors = process.communicate(timeout=100)
    in_one_line(process, errors, "No space left on device")
    assert what in errors.splitlines()[-1]
    assert not [path for path in disk.rglob("*") if path.name.startswith(".")]
    small_disk(10_000)
    if what == "step-00000000.safetensors":
        assert not newest_first(disk / "run")
        return
    if what in ("adapter", "merged"):
        assert read_newest(disk / "run").step == STEPS
    assert main(["--resume", str(disk / "run")]) == 0
    assert_same_result(disk / "run", uninterrupted)
    assert (disk / "merged" / "model.safetensors").exists()


def test_a_read_only_disk_is_found_before_training(words, small_disk, capsys):
    disk = small_disk(1000)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for arguments in (["--output-dir", str(disk / "run")], ["--merged-output", str(disk / "new" / "merged")]):
        where = [] if "--output-dir" in arguments else ["--output-dir", str(disk.with_name("run"))]
        assert main([*words, *where, *arguments]) == 2
        errors = capsys.readouterr().err
        assert "Read-only file system" in errors.splitlines()[-1]
        assert "train: " not in errors
    assert not list(disk.iterdir())


def without_privileges() -> None:
    """Root, too, obeys the permissions of files then: this process gives all its capabilities up."""
    version_3, none = 0x20080522, (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, 0), none) == 0


@pytest.mark.parametrize("option", ["--output-dir", "--merged-output"])
def test_a_folder_without_permission_is_found_before_training(option, words, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    where = {"--output-dir": tmp_path / "run", option: closed / "below" / "it"}
    options = [word for item in where.items() for word in item]
    done = python("train.py", *words, *options, before=without_privileges)
    in_one_line(done, done.stderr, "Permission denied")
    assert str(closed) in done.stderr
    assert "train: " not in done.stderr
    assert list(tmp_path.rglob("*")) == [closed]


def test_a_run_whose_folder_is_moved_stops_and_resumes_there(words, uninterrupted, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    process = start(*words, "--output-dir", str(run))
    wait_for_step(run, 4, process)
    run.rename(moved)
    _, errors = process.communicate(timeout=100)
    in_one_line(process, errors, "cannot be written: No such file or directory")
    assert not run.exists()
    assert main(["--resume", str(moved)]) == 0
    assert_same_result(moved, uninterrupted)


def test_a_folder_that_cannot_be_written_leaves_no_trace(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file/below", "empty/" + "x" * 256, "a\0b"):
        with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / name):
            pass
        assert sorted(tmp_path.rglob("*")) == before
    for name in ("new", "two/folders/below", "empty"):
        with new_folder(tmp_path / name) as folder:
            (folder / "a").write_text("")
        assert (tmp_path / name / "a").exists()
        assert not list(tmp_path.rglob(".*"))
    with new_folder(tmp_path / ("n" * 255)) as folder:  # a name may be as long as that
        (folder / "a").write_text("")
    assert (tmp_path / ("n" * 255) / "a").exists()
