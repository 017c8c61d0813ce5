"""Processes that run a script, as `python script.py` does, without the seconds in which torch is imported.

They are forked off a server that has imported it. Killed, stopped, out of disk: they behave as any other process.
(What happens during the imports, or depends on how Python itself was started, is tested with `subprocess`.)
"""

import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARIES = ["numpy", "torch", "torch._dynamo", "safetensors.torch", "tokenizers", "tqdm"]  # none of ours

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


class Python:
    """`python ARGUMENTS` in the root, with the few methods of subprocess.Popen that tests use. Its output is text.

    `before` is called in the process before the script; pickle must know it.
    """

    def __init__(
        self,
        *arguments: object,
        env: dict[str, str] | None = None,
        stdin: str | os.PathLike = os.devnull,
        stdout: str | os.PathLike = "",
        before: Callable[[], object] | None = None,
    ):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [str(stdin), str(stdout or f"{self.folder.name}/out"), f"{self.folder.name}/err"]
        environment = dict(os.environ if env is None else env)
        self.process = server.Process(target=_run, args=([*map(str, arguments)], environment, self.files, before))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self.process.exitcode

    def communicate(self, timeout: float = 100) -> tuple[str, str]:
        """What it has printed to standard output and standard error, when it has ended."""
        self.wait(timeout)
        out, err = (Path(file).read_bytes() if Path(file).is_file() else b"" for file in self.files[1:])
        return out.decode(errors="surrogateescape"), err.decode(errors="surrogateescape")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run to the end: its status and output."""
    process = Python(*arguments, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)


def start_ranks(commands: list[list]) -> list[Python]:
    """The processes of one run, as on separate machines: no launcher ends the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(commands)), "LOCAL_RANK": "0"}
    return [Python(*command, env=os.environ | meeting | {"RANK": str(rank)}) for rank, command in enumerate(commands)]


def _run(arguments: list[str], environment: dict[str, str], files: list[str], before: Callable[[], object] | None) -> None:
    for number, file in enumerate(files):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "utf-8").partition(":")
    # in the language of a machine without one, where Python lets bytes pass that are not UTF-8
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8", "surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding, errors or "strict")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding, "backslashreplace", write_through=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before:
        before()
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
