"""Compare with transformers + peft and with ONNX Runtime: training, labelling, latency, memory, and the machine's limit.

python bench/compare_peft.py                      on the embedded sample: Markdown tables, and compare_peft.json
python bench/compare_peft.py --only training      one part: training, inference (texts/s) or latency (of one text)
python bench/compare_peft.py --dataset my/folder  on your own texts
python bench/compare_peft.py --tiny               a small model and two batches, to check that this script still runs

All sides (bench/peers.py) start from the same random full-size DistilBERT and train with its dropout, r = 2 on q_lin and v_lin
and the head, AdamW, the same seed and the same maximum length. Each side runs in its own process, so that it does not inherit
the heap and the caches of another. The sides take turns batch by batch: a machine that slows down slows all of them.
A peer computes in float32 or in bfloat16, whichever is faster here. No network is needed.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from limit import SLOW, Limit
from peers import LABELLING, OURS, TRAINING, Labelling, Pipeline, Training, Tutorial, export_onnx

from common.errors import run_cli

os.environ.setdefault("PYTHONWARNINGS", "ignore")  # in the sides' processes
PARTS = "training", "inference", "latency"
Kind = Any  # a subclass of Training or Labelling


class Process:
    """A side in its own process. An exception there is raised here again."""

    side: Training | Labelling  # set in the other process

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(function, *args).result()

    @staticmethod
    def begin(kind: Kind, *args: Any) -> None:
        Process.side = kind(*args)

    @staticmethod
    def answer(method: str, *args: Any) -> Any:
        return getattr(Process.side, method)(*args)

    def ask(self, method: str, *args: Any) -> Any:
        return self.run(self.answer, method, *args)

    def take_turn(self, method: str, *args: Any, pause: float = 0.02) -> tuple[Any, float]:
        """The answer, and the seconds it took. Before, the threads of the last side get time to fall asleep."""
        time.sleep(pause)
        start = time.perf_counter()
        return self.ask(method, *args), time.perf_counter() - start


class Sides:
    """Several sides, each ready for its first batch, with the seconds from the start of its process until then."""

    def __init__(self, kinds: list[Kind], args: tuple, texts: list[str], rounds: int, limit: Limit, trials: Process):
        """`args` are those of the sides' classes. A side that labels has labelled the first of `texts` when it is ready."""
        self.trials = trials.run(try_arithmetics, kinds, args, texts, list(limit.seconds))
        print("starting each side", rounds, "times", file=sys.stderr)
        self.processes: dict[tuple[str, str], Process] = {}
        self.starts: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for kind in kinds:
                for arithmetic in self.chosen(kind):
                    key = kind.name, arithmetic
                    if key in self.processes:
                        self.processes[key].pool.shutdown()
                    start = time.perf_counter()
                    self.processes[key] = process = Process()
                    process.run(Process.begin, kind, *args, arithmetic)
                    if issubclass(kind, Labelling):
                        process.ask("label", texts[:1])
                    self.starts.setdefault(key, []).append(time.perf_counter() - start)

    def chosen(self, kind: Kind) -> list[str]:
        """The arithmetics of a side that are measured: the fastest, or all but the slow ones."""
        seconds = self.trials[kind.name]
        most = min(seconds.values()) if kind.shows_fastest else SLOW * seconds["float32"]
        return [name for name, taken in seconds.items() if taken <= most]

    def rows(self, first: str) -> list[dict[str, Any]]:
        """The rows of a table. `first` says what a side has done when it is ready."""
        return [
            {"": name, "arithmetic": arithmetic, f"{first} after, s": statistics.median(self.starts[name, arithmetic])}
            for name, arithmetic in self.processes
        ]

    def left_out(self) -> str:
        """A sentence about the arithmetics that were tried only."""
        slower = [
            f"{name} in {arithmetic} ({taken / min(seconds.values()):.1f} times as long)"
            for name, seconds in self.trials.items()
            for arithmetic, taken in seconds.items()
            if (name, arithmetic) not in self.processes
        ]
        return f"Tried on a few texts and left out: {', '.join(slower)}." if slower else ""


def try_arithmetics(kinds: list[Kind], args: tuple, texts: list[str], arithmetics: list[str]) -> dict[str, dict[str, float]]:
    """Seconds for 16 texts in each of these arithmetics that a side has, by its name. 0 if there is no choice."""
    import numpy as np

    def run(side: Training | Labelling) -> float:
        start = time.perf_counter()
        if isinstance(side, Training):
            side.step(np.argsort(side.lengths, kind="stable")[:16])
        else:
            side.label(texts[:16])
        return time.perf_counter() - start

    seconds: dict[str, dict[str, float]] = {}
    for kind in kinds:
        seconds[kind.name] = dict.fromkeys((name for name in kind.arithmetics if name in arithmetics), 0.0)
        if len(seconds[kind.name]) > 1:
            for arithmetic in seconds[kind.name]:
                side = kind(*args, arithmetic)
                run(side)  # warms up
                seconds[kind.name][arithmetic] = run(side)
    return seconds


def make_checkpoint(folder: Path, tiny: bool) -> None:
    import torch

    from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained

    torch.manual_seed(0)
    small = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128} if tiny else {}
    tokenizer = load_pretrained("minilm", 4)[1]
    save_pretrained(DistilBertForSequenceClassification(DistilBertConfig(num_labels=4, **small)), tokenizer, folder)


def spread(batches: list[Any], lengths: Any, count: int) -> list[Any]:
    """The longest batch, to warm up, and then `count` batches spread evenly over the lengths, or all of them.

    The few longest batches cost the most, above all in attention and memory. Only a whole epoch weighs them correctly.
    """
    count = min(count, len(batches))
    order = sorted(batches, key=lambda batch: lengths[batch].max())
    return [order[-1], *(order[round((i + 0.5) * len(order) / count - 0.5)] for i in range(count))]


def measure_training(folder: Path, limit: Limit, trials: Process, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from data import load_dataset, training_batches

    texts = load_dataset(options.dataset).train.texts
    lengths = count_tokens(folder, texts, options.max_length)
    size = min(options.batch_size, len(lengths))
    similar = spread(training_batches(lengths, size, seed=0, epoch=0), lengths, options.batches)
    random = np.random.default_rng(0).permutation(len(lengths))
    shuffled = spread(list(random[: len(random) // size * size].reshape(-1, size)), lengths, options.batches)
    batches = {kind.name: shuffled if issubclass(kind, Tutorial) else similar for kind in TRAINING}

    sides = Sides(TRAINING, (folder, options.dataset, options.max_length), texts, options.rounds, limit, trials)
    for (name, _), process in sides.processes.items():
        process.ask("prepare", batches[name])
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sides.processes}
    for number in range(min(map(len, batches.values()))):
        for (name, arithmetic), process in sides.processes.items():
            _, taken = process.take_turn("step", batches[name][number])
            seconds[name, arithmetic].append(taken)
        limit.measure()
        print(f"batch {number}", *(f"{values[-1]:.2f} s" for values in seconds.values()), file=sys.stderr)

    rows = sides.rows("first step")
    for row, ((name, arithmetic), process) in zip(rows, sides.processes.items(), strict=True):
        total = sum(seconds[name, arithmetic][1:])  # the first batch warms up
        measured = np.concatenate(batches[name][1 : len(seconds[name, arithmetic])])
        row["examples/s"] = len(measured) / total
        row["peak memory, MB"] = process.ask("peak_memory")
        row |= limit.shares(arithmetic, int(lengths[measured].sum()), total, training=True)
        process.pool.shutdown()
    return {"rows": rows, "notes": [sides.left_out()]}


def measure_inference(
    sides: Sides, folder: Path, limit: Limit, texts: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Each round labels other texts, so that their lengths are new, as they are in a file."""
    import numpy as np

    seconds: dict[tuple[str, str], float] = dict.fromkeys(sides.processes, 0.0)
    scores: dict[tuple[str, str], list[Any]] = {key: [] for key in sides.processes}
    for number, part in enumerate(np.array_split(texts, 1 + options.rounds)):
        for key, process in sides.processes.items():
            labelled, taken = process.take_turn("label", part.tolist())
            scores[key].append(labelled)
            seconds[key] += taken * (number > 0)  # the first round warms up
        limit.measure()
        print(f"labelled {len(part)} texts", *(f"{taken:.2f} s" for taken in seconds.values()), file=sys.stderr)
    measured = texts[len(np.array_split(texts, 1 + options.rounds)[0]) :]
    tokens = int(count_tokens(folder, measured, options.max_length).sum())
    reference = np.concatenate(scores[Pipeline.name, "float32"])
    rows = sides.rows("first label")
    for row, (key, taken) in zip(rows, seconds.items(), strict=True):
        row["texts/s"] = len(measured) / taken
        row["largest change of a score"] = change = float(np.abs(np.concatenate(scores[key]) - reference).max())
        if change > 1e-3 and key[1] == "float32":
            raise RuntimeError(f"{key[0]} computes something else: a score differs by {change}")
        row |= limit.shares(key[1], tokens, taken, training=False)
    return {"rows": rows, "notes": [sides.left_out()]}


def measure_latency(sides: Sides, texts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One text at a time. Every text was labelled once before, as in a program that has run for a while."""
    import torch

    rows: list[dict[str, Any]] = [{"": name, "arithmetic": arithmetic} for name, arithmetic in sides.processes]
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        seconds: list[list[float]] = [[] for _ in rows]
        for process in sides.processes.values():
            process.ask("set_threads", threads)
        turns, shuffle = list(zip(seconds, sides.processes.values(), strict=True)), random.Random(0).shuffle
        for text in texts[: options.texts // 8] * 2:
            shuffle(turns)  # ONNX Runtime's threads stay awake for a while, at the cost of whoever is next
            for taken, process in turns:
                taken.append(process.take_turn("label", [text], pause=0.1)[1])
        for row, taken in zip(rows, seconds, strict=True):
            warm = sorted(taken[len(taken) // 2 :])
            name = f"{threads} thread{'s' * (threads > 1)}"
            row[f"{name}: median, ms"] = 1000 * statistics.median(warm)
            row[f"{name}: p95, ms"] = 1000 * warm[int(0.95 * len(warm))]
    return {"rows": rows, "notes": []}


def first_answer(folder: Path, rounds: int) -> str:
    """A sentence: where the seconds of predict.py go until it prints its first label."""
    code = """
import json, sys, time
marks = [time.time()]
import torch; marks.append(time.time())
import predict; marks.append(time.time())
from training.inference import load_classifier; from pathlib import Path
classifier = load_classifier(Path(sys.argv[1])); marks.append(time.time())
next(classifier.label(["Oil prices rose on Monday"])); marks.append(time.time())
print(json.dumps(marks))
"""
    runs = []
    for _ in range(rounds):
        start = time.time()
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, stdout=subprocess.PIPE, text=True)
        marks = [start, *json.loads(done.stdout)]
        runs.append([after - before for before, after in itertools.pairwise(marks)])
    seconds = [statistics.median(values) for values in zip(*runs, strict=True)]
    stages = ["Python itself", "import torch", "the other imports", "loading the model", "labelling"]
    parts = ", ".join(f"{stage} {taken:.2f}" for stage, taken in zip(stages, seconds, strict=True))
    return f"predict.py has its first label after {sum(seconds):.2f} s: {parts}."


def count_tokens(folder: Path, texts: list[str], max_length: int) -> Any:
    """The length of each text, (N,)."""
    from tokenizers import Tokenizer

    from data import tokenize

    return tokenize(Tokenizer.from_file(str(folder / "tokenizer.json")), texts, max_length).lengths


def compare(folder: Path, parts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    from data import load_dataset

    data = load_dataset(options.dataset)  # first, so that a mistyped name is reported at once
    texts = (data.test.texts + data.train.texts)[: options.texts]
    make_checkpoint(folder, options.tiny)
    limit, trials, result = Limit(json.loads((folder / "config.json").read_text())), Process(), {}
    if "training" in parts:
        result["training"] = measure_training(folder, limit, trials, options)
        result["training"]["notes"].append(limit.sentence())
    if "inference" in parts or "latency" in parts:
        trials.run(export_onnx, folder)
        sides = Sides(LABELLING, (folder, options.max_length), texts, options.rounds, limit, trials)
        if "inference" in parts:
            result["inference"] = measure_inference(sides, folder, limit, texts, options)
            result["inference"]["notes"].append(limit.sentence())
        if "latency" in parts:
            result["latency"] = measure_latency(sides, texts, options)
            result["latency"]["notes"].append(first_answer(folder, options.rounds))
    return result


def table(part: dict[str, Any], speed: str | None) -> str:
    """Markdown. With a column `speed`, our rows are compared with every other one."""
    rows = [dict(row) for row in part["rows"]]
    for ours in [row for row in part["rows"] if row[""] == OURS]:
        for row in rows:
            if speed and row[""] != OURS:
                row[f"{OURS} in {ours['arithmetic']}"] = f"{ours[speed] / row[speed]:.2f}x"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([cell(column, row.get(column, "")) for column in columns] for row in rows)]
    notes = "".join(f"\n\n{note}" for note in part["notes"] if note)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + notes


def cell(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if column.startswith("of "):
        return f"{value:.0%}"
    return f"{value:.4f}" if column.endswith("score") else f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def circumstances() -> dict[str, Any]:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    flags = [word if not os.path.exists(word) else Path(word).name for word in sys.argv[1:]]
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "bench/compare_peft.py", *flags]),
        "processor": f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "onnxruntime")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="this part; the others remain in the output file")
    parser.add_argument("--dataset", default="sample", help="as for train.py [sample]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument(
        "--batches", type=int, default=6, help="batches that each side trains on; a large number for the whole epoch [6]"
    )
    parser.add_argument(
        "--texts", type=int, default=320, help="texts that each side labels; an eighth of them one by one [320]"
    )
    parser.add_argument("--rounds", type=int, default=2, help="how often each side labels and starts [2]")
    parser.add_argument("--output", type=Path, default=Path("compare_peft.json"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.texts, options.rounds, options.max_length = 2, 16, 1, 32
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(Path(temporary) / "distilbert", [options.only] if options.only else list(PARTS), options)
    about = circumstances()
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    print(f"{about['processor']}; {versions}; {about['date']}; `{about['command']}`")
    for name, part in result.items():
        speed = {"training": "examples/s", "inference": "texts/s"}.get(name)
        print(f"\n### {name}\n\n{table(part, speed)}")
    measured = json.loads(options.output.read_text()) if options.only and options.output.exists() else {}
    measured |= {name: {"circumstances": about} | part for name, part in result.items()}
    options.output.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_cli("compare_peft.py", main))
