"""What each recipe gives, and what it costs: macro-F1 and seconds over learning rate, layers, rank and number of rows.

python bench/sweep.py STAGE ... --data FOLDER --large FOLDER    add the runs of these stages to bench/sweep.csv
python bench/sweep.py --draw                                    draw bench/sweep-rates.svg and sweep-rows.svg, print its tables

Each run is `python train.py` on the embedded encoder, and a row of the CSV when it has ended. Stopped, it goes on where it was:
what has a row is not run again, and a run that was stopped is resumed. The stages `steps`, `rates` and `recipe` choose: they
train on rows of the training part, and score 1,000 other rows of it that are put aside. The others score the test part.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from common.errors import UserError, run_cli
from data import load_dataset
from data.datasets import Split
from training.evaluation import confusion_matrix, macro_f1
from training.linear_model import train_linear_model

ROOT = Path(__file__).parent.parent
WRITING = Lock()
ASIDE = 1_000  # rows put aside to choose by
ALL = 67_594  # rows of the training part of --large
POINT = ("stage", "method", "rows", "seed", "options")
RESULT = ("scored_rows", "macro_f1", "classes_predicted", "trained_parameters", "steps", "seconds", "threads", "torch")
Curve = tuple[list[float], list[float]]  # x and y
COLUMNS = (*POINT, *RESULT, "processor", "date")
LINEAR = "TF-IDF"  # no run of train.py, but training/linear_model.py

PAPER: dict[str, Any] = {}  # what train.py does by default: r = 2 on q_lin and v_lin
BEST: dict[str, Any] = {"target_modules": "all-linear", "r": 8, "learning_rate": 1e-3}
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-4}
METHODS: dict[str, dict[str, Any]] = {
    "q, v; r = 1": {"r": 1},
    "q, v; r = 2": PAPER,
    "q, k, v, out; r = 2": {"target_modules": ["q_lin", "k_lin", "v_lin", "out_lin"]},
    "all linear; r = 2": {"target_modules": "all-linear"},
    "all linear; r = 8": {"target_modules": "all-linear", "r": 8},
    "all linear; r = 16": {"target_modules": "all-linear", "r": 16},
    "full": {"method": "full"},
    "head": {"method": "head"},
}
RATES = {  # by method, the first ones first
    "q, v; r = 2": [1e-3, 2e-3, 5e-4, 4e-3],
    "all linear; r = 8": [1e-3, 2e-3, 5e-4, 4e-3],
    "full": [1e-4, 2e-4, 5e-5, 4e-4],
    "head": [2e-3, 8e-3, 3.2e-2],
    "all linear; r = 2": [1e-3, 2e-3, 4e-3, 5e-4],
    "q, k, v, out; r = 2": [2e-3, 1e-3, 4e-3],
    "q, v; r = 1": [2e-3, 4e-3, 1e-3],
    "all linear; r = 16": [1e-3, 5e-4, 2e-3],
}


CHANGES: list[dict[str, Any]] = [  # to one of the recipes, one at a time
    {"head_lr_ratio": 2},
    {"head_lr_ratio": 4},
    {"lora_alpha": 32},
    {"lora_dropout": 0},
    {"batch_size": 8, "epochs": 2},  # as many steps as with 16
    {"batch_size": 8},
    {"batch_size": 32},
    {"loraplus_lr_ratio": 4},
    {"loraplus_lr_ratio": 16},
    {"label_smoothing": 0.1},
]
SHARES = {"World": 0.8, "Sports": 0.1, "Business": 0.05, "Sci/Tech": 0.03, "Space": 0.02}  # of the uneven set
SPACE = ("nasa", "mars ", "spacecraft", "astronaut", "space station", "saturn")  # a Sci/Tech text with one of them


@dataclass(frozen=True)
class Point:
    """One run: a recipe, on so many rows."""

    stage: str
    method: str
    rows: int
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    test: bool = False  # score the test part
    uneven: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        return self.stage, self.method, str(self.rows), str(self.seed), json.dumps(self.options)


def points() -> Iterator[Point]:
    """Every run, the cheapest question first."""
    for rows, epochs in (100, (15, 36, 60)), (400, (4, 10, 16)):  # about 100, 250 and 400 steps
        for rate in (5e-4, 2e-3):
            for count in epochs:
                yield Point("steps", "q, v; r = 2", rows, PAPER | {"epochs": count, "learning_rate": rate})
    for dtype in "int8", "float32":  # over rounded weights or over the real ones
        for seed in 0, 1, 2:
            yield Point("int8", "q, v; r = 2", 4_000, PAPER | {"dtype": dtype}, seed, test=True)
        yield Point("int8", "q, v; r = 2", 20_000, PAPER | {"dtype": dtype, "epochs": 1}, test=True)
    for method, rates in RATES.items():
        for rate in rates:
            yield Point("rates", method, 1_000, METHODS[method] | {"epochs": 4, "learning_rate": rate})
    for method, recipe in ("all linear; r = 8", BEST), ("q, v; r = 2", PAPER):
        for change in CHANGES:
            yield Point("recipe", method, 1_000, recipe | {"epochs": 4} | change)
    for rows in 100, 400, 1_000, 4_000, 20_000, ALL:
        for seed in (0,) if rows >= 20_000 else (0, 1, 2):
            for method, recipe in (LINEAR, {}), ("q, v; r = 2", PAPER), ("all linear; r = 8", BEST), ("full", FULL):
                stage = "linear" if method == LINEAR else "large" if rows >= 20_000 else "rows"
                yield Point(stage, method, rows, recipe, seed, test=True)
    for seed in 0, 1, 2:
        for weights in "none", "balanced":
            for method, recipe in (LINEAR, {}), ("q, v; r = 2", PAPER), ("all linear; r = 8", BEST):
                yield Point("uneven", method, 300, recipe | {"class_weights": weights}, seed, test=True, uneven=True)


def write_part(path: Path, part: Split, names: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for text, label in zip(part.texts, part.labels, strict=True):
            file.write(json.dumps({"text": text, "label": int(label), "label_text": names[label]}) + "\n")


def draw_rows(labels: np.ndarray, rows: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """So many of `rows` of each class, drawn at random."""
    rows = np.random.default_rng(seed).permutation(rows)
    return np.concatenate([rows[labels[rows] == label][:count] for label, count in enumerate(counts)])


def equal_counts(count: int, classes: int) -> list[int]:
    return [(count + k) // classes for k in range(classes)]


def write_data(source: str, point: Point, folder: Path) -> Path:
    """The folder that `point` trains on: the same rows to score for every point, other rows to train on for every seed."""
    kind = "uneven" if point.uneven else "test" if point.test else "aside"
    folder = folder / f"{Path(source).name}-{point.rows}-{point.seed}-{kind}"
    with WRITING:
        if folder.exists():
            return folder
        dataset = load_dataset(source)
        train, test, names = dataset.train, dataset.test, dataset.label_names
        chosen = np.arange(len(train))
        if point.uneven:
            train, test, names = with_space(train, names), with_space(test, names), [*names, "Space"]
            counts = [[round(size * SHARES[name]) for name in names] for size in (point.rows, ASIDE)]
            chosen = draw_rows(train.labels, chosen, counts[0], seed=1 + point.seed)
            test = test.take(draw_rows(test.labels, np.arange(len(test)), counts[1], seed=0))
        else:
            aside = draw_rows(train.labels, chosen, equal_counts(0 if point.test else ASIDE, len(names)), seed=0)
            chosen = np.setdiff1d(chosen, aside)
            if point.rows < len(chosen):
                chosen = draw_rows(train.labels, chosen, equal_counts(point.rows, len(names)), seed=1 + point.seed)
            test = test if point.test else train.take(aside)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_part(partial / "train.jsonl", train.take(chosen), names)
        write_part(partial / "test.jsonl", test, names)
        partial.rename(folder)
    return folder


def with_space(part: Split, names: Sequence[str]) -> Split:
    """The texts about space are a class of their own: AG News has four, and the uneven set five."""
    about_space = np.array([any(word in text.lower() for word in SPACE) for text in part.texts])
    return Split(part.texts, np.where(about_space & (part.labels == names.index("Sci/Tech")), len(names), part.labels))


def train(point: Point, dataset: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The row of a run of train.py. Goes on with a run that was stopped."""
    run = folder / hashlib.sha256(str(point.key).encode()).hexdigest()[:16]
    if not (run / "results.json").exists():
        if any((run / "checkpoints").glob("*.safetensors")):
            arguments: dict[str, Any] = {"resume": run}
        else:
            shutil.rmtree(run, ignore_errors=True)
            arguments = {"model": "minilm", "dataset": dataset, "output_dir": run, "seed": point.seed} | point.options
        words = [sys.executable, "train.py"] + (["--quiet"] if "resume" not in arguments else [])
        for name, value in arguments.items():
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"train.py failed at {point}: {done.stderr.strip().splitlines()[-1]}")
    results = json.loads((run / "results.json").read_text())
    confusion = np.array(results["after"]["confusion_matrix"])
    shutil.rmtree(run)
    return {
        "scored_rows": confusion.sum(),
        "macro_f1": f"{results['after']['macro_f1']:.4f}",
        "classes_predicted": (confusion.sum(axis=0) > 0).sum(),
        "trained_parameters": results["parameters"]["trainable"],
        "steps": results["train"]["steps"],
        "seconds": f"{results['train']['seconds']:.0f}",
        "threads": threads,
        "torch": results["versions"]["torch"],
    }


def linear(point: Point, folder: Path) -> dict[str, Any]:
    """The row of a linear model."""
    data, start = load_dataset(str(folder)), time.perf_counter()
    predicted, trained_parameters = train_linear_model(data.train, data.test, **point.options)
    matrix = confusion_matrix(data.test.labels, predicted, len(data.label_names))
    return {
        "scored_rows": len(data.test),
        "macro_f1": f"{macro_f1(matrix):.4f}",
        "classes_predicted": len(np.unique(predicted)),
        "trained_parameters": trained_parameters,
        "steps": "",
        "seconds": f"{time.perf_counter() - start:.1f}",
        "threads": 1,
        "torch": "",
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def sweep(options: argparse.Namespace) -> None:
    """Run what the CSV lacks of the stages, `jobs` at a time."""
    done = set()
    if options.csv.exists():
        done = {tuple(row[name] for name in POINT) for row in read_rows(options.csv)}
    else:
        options.csv.write_text(",".join(COLUMNS) + "\n")
    wanted = [point for point in points() if point.stage in options.stages and point.key not in done]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def run(point: Point) -> dict[str, Any]:
        dataset = write_data(
            options.large if point.uneven or point.rows > options.small else options.data, point, options.folder
        )
        return linear(point, dataset) if point.method == LINEAR else train(point, dataset, options.folder, threads)

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(run, point): point for point in wanted}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                point = futures[future]
                row = dict(zip(POINT, point.key, strict=True)) | future.result()
                row |= {"processor": processor(), "date": date.today().isoformat()}
                with open(options.csv, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
                print(f"{number} of {len(wanted)}: {point.key} {row['macro_f1']} in {row['seconds']} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(rows: list[dict[str, str]], folder: Path) -> None:
    """Macro-F1 against the learning rate of each method, and against the number of rows: the mean of the seeds."""
    rates = {
        name: curve([row for row in rows if (row["stage"], row["method"]) == ("rates", name)], learning_rate) for name in RATES
    }
    draw_curves(rates, "learning rate; 1,000 rows, 252 steps", 0.83, folder / "sweep-rates.svg")
    sized = [row for row in rows if row["stage"] in ("linear", "rows", "large")]
    sizes = {name: curve([row for row in sized if row["method"] == name], number_of_rows) for name in (LINEAR, *RATES)}
    draw_curves(sizes, "rows of the training part", 0.6, folder / "sweep-rows.svg")


def draw_curves(curves: dict[str, Curve], label: str, lowest: float, path: Path) -> None:
    """A curve that falls below `lowest` leaves the picture: the run has diverged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (x, y) in curves.items():
        if x:
            axes.plot(x, y, "o--" if name == LINEAR else "o-", label=name)
    axes.set(xscale="log", xlabel=label, ylabel="macro-F1")
    axes.set_ylim(bottom=lowest)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def curve(rows: list[dict[str, str]], key: Callable[[dict[str, str]], float]) -> Curve:
    scores: dict[float, list[float]] = {}
    for row in rows:
        scores.setdefault(key(row), []).append(float(row["macro_f1"]))
    x = sorted(scores)
    return x, [sum(scores[value]) / len(scores[value]) for value in x]


def learning_rate(row: dict[str, str]) -> float:
    return json.loads(row["options"])["learning_rate"]


def number_of_rows(row: dict[str, str]) -> float:
    return int(row["rows"])


def print_tables(rows: list[dict[str, str]]) -> None:
    """For each stage, a line of each recipe: its scores, their mean, and the mean of the seconds."""
    recipes: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        recipes.setdefault((row["stage"], row["method"], row["rows"], row["options"]), []).append(row)
    for recipe, runs in recipes.items():
        scores = [float(row["macro_f1"]) for row in runs]
        seconds = [float(row["seconds"]) for row in runs if row["seconds"]]
        mean_seconds = f"{sum(seconds) / len(seconds):,.0f}" if seconds else "unknown"
        each = " ".join(f"{score:.4f}" for score in scores)
        print(" | ".join([*recipe, each, f"{sum(scores) / len(scores):.4f}", mean_seconds]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=", ".join(dict.fromkeys(point.stage for point in points())))
    parser.add_argument("--data", default="../shared/ag_news_jsonl", help="a folder with train and test [%(default)s]")
    parser.add_argument("--large", default="../shared/ag_news_large", help="another, for more rows than --small [%(default)s]")
    parser.add_argument("--small", type=int, default=4_000, help="rows that --data gives at most [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores [%(default)s]")
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "sweep.csv")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "sweep", help="for data and for unfinished runs")
    parser.add_argument("--draw", action="store_true", help="draw the CSV, and print its tables")
    options = parser.parse_args()
    if options.draw:
        draw(read_rows(options.csv), options.csv.parent)
        print_tables(read_rows(options.csv))
        return 0
    return run_cli("sweep.py", lambda: sweep(options))


if __name__ == "__main__":
    sys.exit(main())
