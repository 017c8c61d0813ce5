"""Compare LoRA, full fine-tuning and a trained head on the same data and seed, in one table.

python compare.py --model minilm --dataset sample         a minute on two cores
python compare.py --dataset my/folder --train-limit 1000  takes the options of train.py; those of LoRA apply to LoRA only

Each method is a run of train.py in its own process, so that its peak memory can be measured. Without --learning-rate, each
uses its own default. The three run folders are kept in a new folder in runs/, or in --output-dir.
"""

if __name__ == "__main__":
    import training.interrupt  # noqa: F401 - Ctrl-C during the imports below

import contextlib
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import Stopped, UserError, run_cli
from common.files import read_json, refuse_to_overwrite
from training.options import LEARNING_RATES, LORA_OPTIONS, Options, flag, parse
from training.signals import Signals

REFUSED = ("method", "resume", "merged_output")  # options of train.py that make no sense for three runs
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
        for method in LEARNING_RATES:
            options = {name: value for name, value in typed.items() if method == "lora" or name not in LORA_OPTIONS}
            results = train(options | {"method": method, "output_dir": str(folder / method), "quiet": True})
            # If the first run fell back to the embedded model or data, the others must use the same.
            typed |= {"model": results["model"], "dataset": results["dataset"]}
            rows.append(row(method, folder / method, results))
    rows, epochs = results["train"]["rows"], results["train"]["epochs"]
    print(f"model {typed['model']}, data {typed['dataset']}: {rows:,} training examples, epochs: {epochs}")
    print(table(rows))


def train(options: dict[str, Any]) -> dict[str, Any]:
    """Run train.py with these options and return its results. Its progress goes to standard error."""
    command = [sys.executable, str(Path(__file__).with_name("train.py"))]
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        command += [flag(name), *map(str, values)]
    print(f"--method {options['method']}", file=sys.stderr)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            process.wait()
        except Stopped as stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10 if stopped.signal == signal.SIGINT else 0)  # Ctrl-C has reached it already
            process.terminate()  # if it still runs; leaving the block waits for its checkpoint
            raise
    if process.returncode:
        raise UserError(f"train.py --method {options['method']} failed: its error is shown above")
    return read_json(Path(options["output_dir"]) / "results.json")


def row(method: str, folder: Path, results: dict[str, Any]) -> list[str]:
    """The cells of one run, in the order of COLUMNS."""
    parameters, measured = results["parameters"], results["train"]
    weight_bytes = sum(path.stat().st_size for name in ("adapter", "model") for path in (folder / name).glob("*.safetensors"))
    return [
        method,
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
