"""What each recipe gives, and what it costs: macro-F1 and seconds over learning rate, layers, rank and number of rows.

python bench/sweep.py STAGE --data FOLDER --large FOLDER    add the runs of a stage to bench/sweep.csv, below

Each run is `python train.py` on the embedded encoder, and a row of the CSV when it has ended. Stopped, it goes on where it was:
what has a row is not run again, and a run that was stopped is resumed. The stages `steps` and `rates` choose: they train
on rows of the training part, and score 1,000 other rows of it that are put aside. The others score the test part.
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
from collections.abc import Iterator
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
from training.evaluation import confusion_matrix, macro_f1

ROOT = Path(__file__).parent.parent
WRITING = Lock()
ASIDE = 1_000  # rows put aside to choose by
POINT = ("stage", "method", "rows", "seed", "options")
RESULT = ("scored_rows", "macro_f1", "classes_predicted", "trained_parameters", "steps", "seconds", "threads", "torch")
COLUMNS = (*POINT, *RESULT, "processor", "date")
LINEAR = "TF-IDF"  # no run of train.py: words and bigrams, and a linear SVM

PAPER: dict[str, Any] = {}  # what train.py does by default: r = 2 on q_lin and v_lin
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
RATES = {
    "q, v; r = 1": [1e-3, 2e-3, 4e-3],
    "q, v; r = 2": [5e-4, 1e-3, 2e-3, 4e-3],
    "q, k, v, out; r = 2": [1e-3, 2e-3, 4e-3],
    "all linear; r = 2": [5e-4, 1e-3, 2e-3, 4e-3],
    "all linear; r = 8": [5e-4, 1e-3, 2e-3, 4e-3],
    "all linear; r = 16": [5e-4, 1e-3, 2e-3],
    "full": [5e-5, 1e-4, 2e-4, 4e-4],
    "head": [2e-3, 8e-3, 3.2e-2],
}


@dataclass(frozen=True)
class Point:
    """One run: a recipe, on so many rows."""

    stage: str
    method: str
    rows: int
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    test: bool = False  # score the test part

    @property
    def key(self) -> tuple[str, ...]:
        return self.stage, self.method, str(self.rows), str(self.seed), json.dumps(self.options)


def points() -> Iterator[Point]:
    """Every run, the cheapest question first."""
    for rows, epochs in (100, (15, 36, 60)), (400, (4, 10, 16)):  # about 100, 250 and 400 steps
        for rate in (5e-4, 2e-3):
            for count in epochs:
                yield Point("steps", "q, v; r = 2", rows, PAPER | {"epochs": count, "learning_rate": rate})
    for seed in 0, 1, 2:
        for rows in 100, 1_000, 4_000:
            yield Point("small", LINEAR, rows, seed=seed, test=True)
        yield Point("small", "q, v; r = 2", 100, PAPER, seed, test=True)
        yield Point("small", "q, v; r = 2", 100, PAPER | {"learning_rate": 2e-3}, seed, test=True)
    for dtype in "int8", "float32":  # over rounded weights or over the real ones
        for seed in 0, 1, 2:
            yield Point("int8", "q, v; r = 2", 4_000, PAPER | {"dtype": dtype}, seed, test=True)
        yield Point("int8", "q, v; r = 2", 20_000, PAPER | {"dtype": dtype, "epochs": 1}, test=True)
    for method, rates in RATES.items():
        for rate in rates:
            yield Point("rates", method, 1_000, METHODS[method] | {"epochs": 4, "learning_rate": rate})


def write_part(folder: Path, name: str, dataset: Any, texts: list[str], labels: np.ndarray, chosen: np.ndarray) -> None:
    with open(folder / name, "w", encoding="utf-8") as file:
        for i in chosen:
            row = {"text": texts[i], "label": int(labels[i]), "label_text": dataset.label_names[labels[i]]}
            file.write(json.dumps(row) + "\n")


def stratified(labels: np.ndarray, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of `rows`, as many of each class as of any other, or one more."""
    rows = np.random.default_rng(seed).permutation(rows)
    classes = np.unique(labels)
    each = [rows[labels[rows] == label] for label in classes]
    return np.concatenate([of_class[: (count + k) // len(classes)] for k, of_class in enumerate(each)])


def write_data(source: str, point: Point, folder: Path) -> Path:
    """The folder that `point` trains on: the same rows to score for every point, other rows to train on for every seed."""
    folder = folder / f"{Path(source).name}-{point.rows}-{point.seed}-{'test' if point.test else 'aside'}"
    with WRITING:
        if folder.exists():
            return folder
        dataset = load_dataset(source)
        train, everything = dataset.train, np.arange(len(dataset.train.labels))
        aside = stratified(train.labels, everything, 0 if point.test else ASIDE, seed=0)
        rest = np.setdiff1d(everything, aside)
        if point.rows < len(rest):
            rest = stratified(train.labels, rest, point.rows, seed=1 + point.seed)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_part(partial, "train.jsonl", dataset, train.texts, train.labels, rest)
        scored = dataset.test if point.test else train
        chosen = np.arange(len(scored.labels)) if point.test else aside
        write_part(partial, "test.jsonl", dataset, scored.texts, scored.labels, chosen)
        partial.rename(folder)
    return folder


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


def linear(folder: Path) -> dict[str, Any]:
    """The row of a linear SVM on TF-IDF."""
    import sklearn
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    data, start = load_dataset(str(folder)), time.perf_counter()
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC())
    predicted = model.fit(data.train.texts, data.train.labels).predict(data.test.texts)
    matrix = confusion_matrix(data.test.labels, predicted, len(data.label_names))
    return {
        "scored_rows": len(data.test),
        "macro_f1": f"{macro_f1(matrix):.4f}",
        "classes_predicted": len(np.unique(predicted)),
        "trained_parameters": model[-1].coef_.size,
        "steps": "",
        "seconds": f"{time.perf_counter() - start:.1f}",
        "threads": 1,
        "torch": f"scikit-learn {sklearn.__version__}",
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
        with open(options.csv, newline="", encoding="utf-8") as file:
            done = {tuple(row[name] for name in POINT) for row in csv.DictReader(file)}
    else:
        options.csv.write_text(",".join(COLUMNS) + "\n")
    wanted = [point for point in points() if point.stage in options.stages and point.key not in done]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def run(point: Point) -> dict[str, Any]:
        dataset = write_data(options.data if point.rows <= options.small else options.large, point, options.folder)
        return linear(dataset) if point.method == LINEAR else train(point, dataset, options.folder, threads)

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=", ".join(dict.fromkeys(point.stage for point in points())))
    parser.add_argument("--data", default="../shared/ag_news_jsonl", help="a folder with train and test [%(default)s]")
    parser.add_argument("--large", default="../shared/ag_news_large", help="another, for more rows than --small [%(default)s]")
    parser.add_argument("--small", type=int, default=4_000, help="rows that --data gives at most [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores [%(default)s]")
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "sweep.csv")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "sweep", help="for data and for unfinished runs")
    options = parser.parse_args()
    return run_cli("sweep.py", lambda: sweep(options))


if __name__ == "__main__":
    sys.exit(main())
