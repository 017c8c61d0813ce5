"""Label new text with a trained adapter.

python predict.py runs/2026-11-24-103855 "Oil prices rose on Monday"           print a small table for each text
python predict.py runs/2026-11-24-103855 --input news.csv > labels.jsonl       write JSON Lines in the order of the input
python predict.py an/adapter/of/peft --model distilbert-base-uncased < texts   read one text per line, write JSON Lines
"""

if __name__ == "__main__":
    import training.interrupt  # noqa: F401 - Ctrl-C during the imports below

import io
import json
import sys
from pathlib import Path

from common.errors import UserError, run_cli
from data import read_texts
from training.evaluation import progress_bar
from training.inference import load_classifier
from training.options import Parser


def run(arguments: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="a run folder, or an adapter folder written here or by peft")
    parser.add_argument("texts", nargs="*", help="texts to label [those of --input, or of standard input]")
    parser.add_argument(
        "--input", type=Path, help="file with texts: .txt (one per line), or .jsonl or .csv with a field `text`"
    )
    parser.add_argument("--json", action="store_true", help="print JSON Lines for texts on the command line, too")
    parser.add_argument("--model", help="the base model [the one that the adapter names]")
    parser.add_argument("--max-length", type=int, help="maximum tokens per text; the rest is cut off [as in training]")
    parser.add_argument("--device", default="auto", help="auto (the best available), cpu, cuda, mps [auto]")
    options = parser.parse_intermixed_args(arguments)
    if options.texts and options.input is not None:
        raise UserError("both texts and --input were given. Choose one of them")

    classifier = load_classifier(options.folder, options.model, options.device, options.max_length)
    texts = options.texts or read_texts(options.input)
    quiet = bool(options.texts) or sys.stdout.isatty() or not sys.stderr.isatty()
    with progress_bar(None, "predict", leave=False, quiet=quiet) as bar:
        for answer in classifier.label(texts):
            if options.texts and not options.json:
                print(answer["text"])
                for name, score in sorted(answer["scores"].items(), key=lambda item: -item[1]):
                    print(f"  {score:.4f}  {name}")
            else:
                print(json.dumps(answer, ensure_ascii=sys.stdout.encoding != "utf-8"))
            bar.update()


def main(arguments: list[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may not be able to show a text
    return run_cli("predict.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
