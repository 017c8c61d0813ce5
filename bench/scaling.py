"""How the cost of training grows with the number of examples, their length, the rank, and the number of processes.

python bench/scaling.py                       writes scaling.svg and scaling.json
python bench/scaling.py --dataset my/folder   the same with your own texts

Every point is a run of `python train.py` in its own process (under `torchrun` for several processes). The number of examples is
varied with a small model (dimension 64, two layers), which would show any cost that is not arithmetic. Length, rank and
processes are varied with a full-size DistilBERT with random weights. No network is needed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from common.errors import run_cli
from data import load_dataset
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained
from training.device import peak_memory_mb

ROOT = Path(__file__).parent.parent
EXAMPLES = [1_000, 4_000, 16_000, 60_000, 120_000]
LENGTHS = [64, 128, 256, 512]
RANKS = [1, 2, 4, 8, 16, 32, 64]
PROCESSES = [1, 2]


def write_dataset(folder: Path, texts: list[str], count: int, repeat: int = 1) -> Path:
    """`count` rows made from `texts`, used again and again. Each row has a unique word, then its text `repeat` times."""
    folder.mkdir()
    for part, rows in [("train", count), ("test", 32)]:
        with open(folder / f"{part}.jsonl", "w") as file:
            for i in range(rows):
                row = {"text": " ".join([f"word{i}", *[texts[i % len(texts)]] * repeat]), "label": i % 4}
                file.write(json.dumps(row) + "\n")
    return folder


def train(model: Path, dataset: Path, processes: int = 1, **options: object) -> dict[str, Any]:
    """One epoch of train.py: milliseconds per example and peak memory in MB (of the first process)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    with tempfile.TemporaryDirectory() as temporary:
        arguments = {"model": model, "dataset": dataset, "output_dir": f"{temporary}/run", "epochs": 1} | options
        flags = [str(word) for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", value)]
        subprocess.run([sys.executable, *launcher, "train.py", *flags], cwd=ROOT, check=True, capture_output=True)
        measured = json.loads((Path(temporary) / "run" / "results.json").read_text())["train"]
    return {"ms": 1000 / measured["examples_per_second"], "mb": measured["peak_memory_mb"]}


def start_up(dataset: Path) -> dict[str, float]:
    """Reading and tokenising alone, in its own process: seconds, and the growth of peak memory in MB."""
    command = [sys.executable, __file__, "--start-up", str(dataset)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_start_up(dataset: str) -> None:
    from data import tokenize

    tokenizer = load_pretrained("minilm", 4)[1]
    before, start = peak_memory_mb(torch.device("cpu")), time.perf_counter()
    texts = tokenize(tokenizer, load_dataset(dataset).train.texts, 256)
    seconds = time.perf_counter() - start
    print(
        json.dumps({"texts": len(texts), "seconds": seconds, "mb": (peak_memory_mb(torch.device("cpu")) or 0) - (before or 0)})
    )


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(13, 5), sharex="col", layout="constrained")
    for column, (what, points) in enumerate(results["runs"].items()):
        x = [int(value) for value in points]
        for row, (key, label) in enumerate([("ms", "ms per example"), ("mb", "peak memory, MB")]):
            axis = axes[row, column]
            axis.plot(x, [point[key] for point in points.values()], "o-", color="#1f6f8b")
            axis.set_ylim(0, 1.1 * max(point[key] for point in points.values()))
            axis.set_xscale("log", base=2 if what != "examples" else 10)
            axis.set_xticks(x, [f"{value:,}" for value in x], rotation=30)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if row:
                axis.set_xlabel(what)
            if not column:
                axis.set_ylabel(label)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sample", help="texts to make the data sets from [sample]")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--tiny", action="store_true", help="two points of each and a small model, to check that it runs")
    parser.add_argument("--start-up", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start_up:
        return measure_start_up(options.start_up)

    examples, lengths, ranks = (points[:2] if options.tiny else points for points in (EXAMPLES, LENGTHS, RANKS))
    tokenizer = load_pretrained("minilm", 4)[1]
    texts = load_dataset(options.dataset).train.texts
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        small = DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128, num_labels=4)
        full = small if options.tiny else DistilBertConfig(num_labels=4)
        for name, config in [("small", small), ("full", full)]:
            save_pretrained(DistilBertForSequenceClassification(config), tokenizer, folder / name)
        few, longer = write_dataset(folder / "few", texts, 320), write_dataset(folder / "long", texts, 64, repeat=20)

        runs: dict[str, dict[int, Any]] = {"examples": {}, "max length": {}, "r": {}, "processes": {}}
        for count in examples:
            dataset = write_dataset(folder / str(count), texts, count)
            runs["examples"][count] = train(folder / "small", dataset, batch_size=32)
            print(count, "examples", runs["examples"][count], flush=True)
        results: dict[str, Any] = {"start-up": start_up(dataset)}
        print("start-up", results["start-up"], flush=True)
        for length in lengths:
            runs["max length"][length] = train(folder / "full", longer, max_length=length)
        for r in ranks:
            runs["r"][r] = train(folder / "full", few, r=r)
        for processes in PROCESSES:
            runs["processes"][processes] = train(folder / "full", few, processes)
        for what in ("max length", "r", "processes"):
            print(what, runs[what])
    results |= {"runs": runs, "cores": os.cpu_count(), "torch": torch.__version__}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(run_cli("scaling.py", main))
