"""LoRA, full fine-tuning and the head alone on the same data and seed: the point of LoRA in one table.

python compare.py --model minilm --dataset sample         a minute on two cores
python compare.py --dataset my/folder --train-limit 1000  with the options of train.py; those of LoRA are for LoRA alone

Each method is a run of train.py in a process of its own, so that its peak memory is its own, with the learning rate of
its own unless one is typed. The folders of the three runs stay, in runs/ and a name of its own, or in --output-dir.
"""

import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError, run_cli
from common.files import read_json, refuse_to_overwrite
from training.options import LEARNING_RATES, OF_LORA, Options, flag, parse

OWN = ("method", "resume", "merged_output")  # of train.py's options, those that have no meaning here
COLUMNS = ("method", "trained parameters", "of all", "optimizer, MB", "saved, MB", "peak memory, MB", "seconds", "macro-F1")


def run(arguments: list[str] | None) -> None:
    typed = parse(arguments, __doc__)
    for name in OWN:
        if name in typed:
            raise UserError(f"{flag(name)} is for train.py; here every method is run, from its beginning")
    Options(**typed)  # what is wrong with an option is said before anything runs
    folder = Path(typed.pop("output_dir", f"runs/{datetime.now():%Y-%m-%d-%H%M%S}-compare"))
    refuse_to_overwrite(folder)
    results = {}
    for method in LEARNING_RATES:
        options = {name: value for name, value in typed.items() if method == "lora" or name not in OF_LORA}
        results[method] = train(options | {"method": method, "output_dir": str(folder / method), "quiet": True})
        typed |= {what: results[method][what] for what in ("model", "dataset")}  # the others take what the first found
    print(f"model {typed['model']}, data {typed['dataset']}: {results['lora']['train']['examples']:,} examples of training")
    print(table([row(method, folder / method, result) for method, result in results.items()]))


def train(options: dict[str, Any]) -> dict[str, Any]:
    """The results of a run of train.py with these options. Its progress goes to standard error, as ever."""
    command = [sys.executable, str(Path(__file__).with_name("train.py"))]
    for name, value in options.items():
        words = [] if value is True else value if isinstance(value, list) else [value]
        command += [flag(name), *map(str, words)]
    print(f"--method {options['method']}", file=sys.stderr)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"--method {options['method']} did not end well: train.py says above why")
    return read_json(Path(options["output_dir"]) / "results.json")


def row(method: str, run: Path, results: dict[str, Any]) -> list[str]:
    """What the table says of one run, in the order of COLUMNS."""
    parameters, trained = results["parameters"], results["train"]
    saved = sum(path.stat().st_size for name in ("adapter", "model") for path in (run / name).glob("*.safetensors"))
    return [
        method,
        f"{parameters['trainable']:,}",
        f"{parameters['percent']:.2f} %",
        f"{trained['optimizer_bytes'] / 1e6:,.1f}",
        f"{saved / 1e6:,.1f}",
        "unknown" if trained["peak_memory_mb"] is None else f"{trained['peak_memory_mb']:,.0f}",
        f"{trained['seconds']:,.1f}",
        f"{results['after']['macro_f1']:.4f}",
    ]


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, cells, widths)) for cells in [COLUMNS, *rows])


def main(arguments: list[str] | None = None) -> int:
    return run_cli("compare.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
