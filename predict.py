"""Label new text with a trained adapter.

python predict.py runs/2026-11-24-103855 "Oil prices rose on Monday"           print a small table for each text
python predict.py runs/2026-11-24-103855 --input news.csv --output labels.csv  keep every column, add `label` and `score`
python predict.py runs/2026-11-24-103855 --input news.csv > labels.jsonl       write every score, as JSON Lines
python predict.py an/adapter/of/peft --model distilbert-base-uncased < texts   read one text per line, write JSON Lines
"""

if __name__ == "__main__":
    import training.interrupt  # noqa: F401 - Ctrl-C during the imports below

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common.errors import UserError, run_cli
from data import Row, open_table, read_rows
from data.tables import TEXTS
from training.evaluation import progress_bar
from training.inference import CHUNK, in_parts, load_classifier
from training.options import Parser
from training.run_folder import require_ended
from training.trained_folder import run_results

SAMPLE = 256  # texts on which int8 is compared with float32


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="a run folder, or an adapter folder written here or by peft")
    add("texts", nargs="*", help="texts to label [those of --input, or of standard input]")
    add("--input", type=Path, help="file with texts: a table (.csv, .tsv, .jsonl, .json), or .txt with one text per line")
    add("--text-column", nargs="+", default=(), help="columns of --input with the text [as in training, or text]")
    add("--output", type=Path, help="file for --input with a label and a score in each row: .csv, .tsv, .jsonl")
    add("--threshold", type=float, default=0.0, help="give no label to a text with a lower score [0]")
    add("--json", action="store_true", help="print JSON Lines for texts on the command line, too")
    add("--model", help="the base model [the one that the adapter names]")
    add("--max-length", type=int, help="maximum tokens per text; the rest is cut off [as in training]")
    types = ("auto", "float32", "bfloat16", "int8")
    add("--dtype", default="auto", choices=types, help="float32, bfloat16, int8, or auto, the fastest [auto]")
    devices = ("auto", "cpu", "cuda", "mps")
    add("--device", default="auto", choices=devices, help="auto (the best available), cpu, cuda, mps [auto]")
    options = parser.parse_intermixed_args(arguments)
    if options.texts and options.input is not None:
        raise UserError("both texts and --input were given. Choose one of them")
    if files := [text for text in options.texts if os.path.isfile(text)]:
        raise UserError(f"{files[0]} is a file. To label the texts in it, pass --input {files[0]}")
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold is {options.threshold}. It must be between 0 and 1")
    require_ended(options.folder)  # before texts are read, which may be typed
    if options.output:
        from training.artifacts import refuse_own_files  # here: it imports the hub's client

        refuse_own_files(options.output, options.folder, "--output")
        if options.input and options.output.exists() and options.input.exists() and options.output.samefile(options.input):
            raise UserError(f"--output would overwrite --input {options.input}. Name another file")
    return options


def run(arguments: list[str] | None) -> None:
    options = read_options(arguments)
    source = 0 if options.input is None else options.input
    is_stream = not options.texts and os.path.exists(source) and not os.path.isfile(source)  # a pipe or a keyboard
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(open_table(options.output)) if options.output else None
        rows = read_rows(options.input, options.text_column or text_columns(options.folder, options.input))
        if options.texts:
            rows = (Row(number, text, None, {"text": text}) for number, text in enumerate(options.texts, 1))
        parts = in_parts(rows, wait=not is_stream)
        first = [] if is_stream else next(parts, [])
        sample = [row.text for row in first[:SAMPLE]] if len(first) == CHUNK else []  # with fewer texts, it does not pay
        classifier = load_classifier(options.folder, options.model, options.device, options.max_length, options.dtype, sample)
        if not options.texts:
            print(f"arithmetic in {classifier.arithmetic}", file=sys.stderr)
        is_screen = sys.stdout.isatty() and sys.stderr.isatty() and not table  # where a bar would disturb the answers
        quiet = bool(options.texts) or is_screen
        bar = stack.enter_context(progress_bar(None, "predict", not sys.stderr.isatty(), quiet, at_once=False))
        labelled, reasons = 0, Counter[str]()  # for no label
        started = time.monotonic()
        for part in itertools.chain([first], parts):
            answers = classifier.label([row.text for row in part], options.threshold)
            for row, answer in zip(part, answers, strict=True):
                if table:
                    table.write(options.input, row, answer["label"], answer["score"])
                elif options.texts and not options.json:
                    print_scores(answer)
                else:
                    print(json.dumps(answer, ensure_ascii=sys.stdout.encoding != "utf-8"))
                reasons.update([answer["reason"]] if "reason" in answer else [])
                bar.update()
            sys.stdout.flush()
            labelled += len(part)
    if not options.texts:
        without = "".join(f"; {count:,} without a label: {reason}" for reason, count in reasons.items())
        print(f"{labelled:,} texts in {time.monotonic() - started:.1f} s{without}", file=sys.stderr)
    if options.output:
        print(f"saved {options.output}")


def text_columns(folder: Path, source: Path | None) -> list[str]:
    """The columns of text that the run was trained on, if `source` is a table and the run says some."""
    options = {} if source is None or source.suffix.lower() in TEXTS else run_results(folder).get("options")
    columns = options.get("text_column") if isinstance(options, dict) else None
    return [column for column in columns if isinstance(column, str)] if isinstance(columns, list) else []


def print_scores(answer: dict[str, Any]) -> None:
    print(answer["text"])
    if "reason" in answer:
        print(f"  no label: {answer['reason']}")
    for name, score in sorted(answer["scores"].items(), key=lambda item: -item[1]):
        print(f"  {score:.4f}  {name}")


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may not be able to show a text
    return run_cli("predict.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
