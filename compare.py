"""Compare LoRA, full fine-tuning, a trained head and a linear model on the same data and seed, in one table.

python compare.py --model minilm --dataset sample         some minutes on two cores
python compare.py --dataset my/folder --train-limit 1000  takes the options of train.py; those of LoRA apply to LoRA only

    lora         r = 2 on q_lin and v_lin, or what the LoRA options say
    all-linear   r = 8 on every linear layer, unless the options name another r
    full         every weight
    head         only the head
    TF-IDF       a linear model of words, without a network: is a better score worth the seconds?

Each of the first four is a run of train.py in its own process, so that its peak memory can be measured. Without
--learning-rate, each uses its own default. Their run folders are kept in a new folder in runs/, or in --output-dir.
"""

if __name__ == "__main__":
    import training.interrupt  # noqa: F401 - Ctrl-C during the imports below

import contextlib
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import Stopped, UserError, run_cli
from common.files import read_json, refuse_to_overwrite
from training.evaluation import confusion_matrix, macro_f1
from training.linear_model import train_linear_model
from training.loading import load_data
from training.options import ALL_LINEAR, LORA_OPTIONS, Options, flag, parse
from training.signals import Signals

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "all-linear": {"method": "lora", **ALL_LINEAR},
    "full": {"method": "full"},
    "head": {"method": "head"},
}
REFUSED = ("method", "adapter", "resume", "merged_output")  # options of train.py that make no sense for several runs
COLUMNS = ("method", "trained parameters", "of all", "optimizer, MB", "saved, MB", "peak memory, MB", "seconds", "macro-F1")


def run(arguments: list[str] | None) -> None:
    typed = parse(arguments, __doc__)
    for name in REFUSED:
        if name in typed:
            raise UserError(f"{flag(name)} is not for compare.py, which runs every method from the start: leave it out")
    Options(**typed)  # report a wrong option before anything runs
    folder = Path(typed.pop("output_dir", f"runs/{datetime.now():%Y-%m-%d-%H%M%S}-compare"))
    refuse_to_overwrite(folder)
    rows = []
    with Signals(folder):
        for name, recipe in RUNS.items():
            own = {key: value for key, value in typed.items() if recipe["method"] == "lora" or key not in LORA_OPTIONS}
            options = recipe | own | {"output_dir": str(folder / name), "quiet": True}
            if name == "all-linear":
                options["target_modules"] = recipe["target_modules"]
            results = train(name, options)
            # If the first run fell back to the embedded model or data, the others must use the same.
            typed |= {"model": results["model"], "dataset": results["dataset"]}
            rows.append(row(name, folder / name, results))
        rows += linear_model(results)
    count, epochs = results["train"]["rows"], results["train"]["epochs"]
    print(f"model {typed['model']}, data {typed['dataset']}: {count:,} training examples, epochs: {epochs}")
    print(table(rows))
    print(f"saved {folder}, with the runs {', '.join(RUNS)}. A page about one: python report.py {folder / 'lora'}")


def linear_model(results: dict[str, Any]) -> list[list[str]]:
    """The row of the linear model on the data of a run. No row, and a line that says why, if it cannot be trained."""
    print("TF-IDF", file=sys.stderr)
    try:
        data = load_data(results["dataset"], Options(**results["options"]), results["dataset_commit"])
        start = time.perf_counter()
        class_weights, seed = results["options"]["class_weights"], results["seed"]
        predicted, trained_parameters = train_linear_model(data.train, data.test, class_weights, seed)
    except UserError as error:
        print(f"TF-IDF is left out: {error}", file=sys.stderr)
        return []
    seconds = time.perf_counter() - start
    score = macro_f1(confusion_matrix(data.test.labels, predicted, len(data.label_names)))
    return [["TF-IDF", f"{trained_parameters:,}", "", "", "", "", f"{seconds:,.1f}", f"{score:.4f}"]]


def train(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run train.py with these options and return its results. Its progress goes to standard error."""
    command = [sys.executable, str(Path(__file__).with_name("train.py"))]
    for option, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        command += [flag(option), *map(str, values)]
    print(name, file=sys.stderr)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            process.wait()
        except Stopped as stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10 if stopped.signal == signal.SIGINT else 0)  # Ctrl-C has reached it already
            process.terminate()  # if it still runs; leaving the block waits for its checkpoint
            raise
    if process.returncode:
        raise UserError(f"the run of {name} failed: its error is shown above")
    return read_json(Path(options["output_dir"]) / "results.json")


def row(name: str, folder: Path, results: dict[str, Any]) -> list[str]:
    """The cells of one run, in the order of COLUMNS."""
    parameters, measured = results["parameters"], results["train"]
    weight_bytes = sum(path.stat().st_size for name in ("adapter", "model") for path in (folder / name).glob("*.safetensors"))
    return [
        name,
        f"{parameters['trainable']:,}",
        f"{parameters['percent']:.2f} %",
        f"{measured['optimizer_bytes'] / 1e6:,.1f}",
        f"{weight_bytes / 1e6:,.1f}",
        "unknown" if measured["peak_memory_mb"] is None else f"{measured['peak_memory_mb']:,.0f}",
        f"{measured['seconds']:,.1f}",
        f"{results['after']['macro_f1']:.4f}",
    ]


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, cells, widths)) for cells in [COLUMNS, *rows])


def main(arguments: list[str] | None = None) -> int:
    return run_cli("compare.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
