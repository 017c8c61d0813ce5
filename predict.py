"""Label new text with a trained adapter.

python predict.py runs/2026-11-24-103855 "Oil prices rose on Monday"           a small table for each text
python predict.py runs/2026-11-24-103855 --input news.csv > labels.jsonl       JSON Lines in the order of the input
python predict.py an/adapter/of/peft --model distilbert-base-uncased < texts   a text a line, and JSON Lines out
"""

import argparse
import io
import json
import sys
from pathlib import Path

from common.errors import UserError, run_cli
from data import read_texts
from training.evaluation import progress_bar
from training.inference import label, load_classifier
from training.options import Parser


def run(arguments: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a run's folder, or an adapter's, written here or by peft")
    parser.add_argument("texts", nargs="*", help="texts to label; without any, those of --input, or of standard input")
    parser.add_argument("--input", type=Path, help="a file of texts: .txt (one a line), .jsonl or .csv (a field called text)")
    parser.add_argument("--json", action="store_true", help="JSON Lines for texts on the command line, too")
    parser.add_argument("--model", help="the base model, if the adapter does not name it or it is elsewhere here")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a text that are read [256]")
    parser.add_argument("--device", default="auto", help="auto (the best there is), cpu, cuda, mps [auto]")
    options = parser.parse_intermixed_args(arguments)
    if options.texts and options.input is not None:
        raise UserError("texts and --input contradict each other: leave out one of them")

    forward, tokenizer, names = load_classifier(options.folder, options.model, options.device, options.max_length)
    texts = options.texts or read_texts(options.input)
    quiet = bool(options.texts) or sys.stdout.isatty() or not sys.stderr.isatty()
    with progress_bar(None, "predict", leave=False, quiet=quiet) as bar:
        for answer in label(forward, tokenizer, names, texts, options.max_length):
            if options.texts and not options.json:
                print(answer["text"])
                for name, score in sorted(answer["scores"].items(), key=lambda item: -item[1]):
                    print(f"  {score:.4f}  {name}")
            else:
                print(json.dumps(answer, ensure_ascii=sys.stdout.encoding != "utf-8"))
            bar.update()


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # rather than fail at a text that the console cannot show
    return run_cli("predict.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
