"""Make each break of docs/break-it.md, one at a time, and check that the test named there fails.

python tests/robustness/break_it.py            two minutes; exit status 1, and one line for each break that is not caught
python tests/robustness/break_it.py --train    instead, print what training on the embedded encoder says under each break

It works on copies of the files that git tracks, with the changes of the working tree.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "break-it.md"
SECTION = re.compile(
    r"(?P<title>.*?)\n.*?`(?P<file>[\w/]+\.py)`.*?```diff\n(?P<diff>.*?)```.*?`(?P<test>tests/[\w/]+\.py::[^`]+)`", re.DOTALL
)


@dataclass(frozen=True)
class Break:
    title: str
    file: str
    old: str  # whole lines, with their neighbours if the lines alone occur twice
    new: str
    test: str  # the name that pytest takes

    def apply(self, root: Path) -> None:
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.title}: what it changes occurs {count} times in {self.file}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def read_breaks() -> list[Break]:
    """The document's sections. Raises ValueError for a section without a file, a diff or a test."""
    breaks = []
    for section in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        if not (found := SECTION.match(section)):
            raise ValueError(f"{DOCUMENT.name}: file, diff or test missing in the section {section.splitlines()[0]!r}")
        lines = found["diff"].splitlines(keepends=True)
        old, new = ("".join("\n" + line[1:-1] for line in lines if line[0] in kinds) + "\n" for kinds in (" -", " +"))
        breaks.append(Break(found["title"], found["file"], old, new, found["test"]))
    return breaks


def copy_to(folder: Path) -> Path:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in a copy, with the copy's modules, in one thread because two copies run at a time."""
    environment = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    return subprocess.run([sys.executable, *arguments], cwd=root, env=os.environ | environment, capture_output=True, text=True)


def run_tests(root: Path, *tests: str) -> subprocess.CompletedProcess:
    return python(root, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *tests)


def why_not_caught(broken: Break) -> str | None:
    """None if the test fails because of an assertion, otherwise the reason."""
    with tempfile.TemporaryDirectory() as folder:
        broken.apply(copy_to(Path(folder)))
        done = run_tests(Path(folder), broken.test)
    if done.returncode == 0:
        return "passes all the same"
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == 1 and any(re.search(r" - (assert |AssertionError)", line) for line in failures):
        return None
    return f"fails with an error, not with an assertion: {(failures or done.stdout.splitlines() or [done.stderr])[-1]}"


def check(breaks: list[Break]) -> list[str]:
    """One line for each fault: a test that fails on the unbroken code, or a test that does not notice its break."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        done = run_tests(copy_to(Path(folder)), *dict.fromkeys(broken.test for broken in breaks))
    if done.returncode:
        wrong.append(f"with nothing broken: {done.stdout[-2000:]}")
    with ThreadPoolExecutor(2) as pool:
        for broken, why in zip(breaks, pool.map(why_not_caught, breaks), strict=True):
            print(f"{broken.title}: {'caught' if why is None else 'NOT CAUGHT'} by {broken.test}", flush=True)
            if why is not None:
                wrong.append(f"{broken.title}: {broken.test} {why}")
    return wrong


def train(broken: Break | None) -> str:
    """What `python train.py --model minilm --dataset sample` says with a break: the loss every ten steps, and macro-F1."""
    with tempfile.TemporaryDirectory() as folder:
        root = copy_to(Path(folder))
        if broken:
            broken.apply(root)
        done = python(root, "train.py", "--model", "minilm", "--dataset", "sample", "--epochs", "3", "--output-dir", "run")
        metrics = root / "run" / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        last = done.stderr.splitlines()[-1:] if done.returncode else []
    losses = " ".join(f"{json.loads(line)['loss']:.3f}" for line in lines)
    title = broken.title if broken else "0. Nothing broken"
    return "\n  ".join([title, f"loss: {losses}", *re.findall("macro-F1.*", done.stdout), *last])


def main(arguments: list[str]) -> int:
    breaks = read_breaks()
    if arguments == ["--train"]:
        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(train, [None, *breaks]):
                print(result, flush=True)
        return 0
    wrong = check(breaks)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(breaks)} breaks, {len(wrong)} not caught" if wrong else f"{len(breaks)} breaks, each caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
