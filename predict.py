"""Label new text with a trained adapter.

python predict.py runs/2026-11-24-103855 "Oil prices rose on Monday"           a small table for each text
python predict.py runs/2026-11-24-103855 --input news.csv > labels.jsonl       JSON Lines in the order of the input
python predict.py an/adapter/of/peft --model distilbert-base-uncased < texts   a text a line, and JSON Lines out
"""

import installed  # noqa: F401, I001 - before what may be missing

import argparse
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data import evaluation_batches, read_texts, tokenize
from errors import UserError, exit_status
from evaluate import Forward, compute_logits, progress
from files import read_json
from lora import PeftModel
from lora.adapter import PREFIX, read_adapter
from lora.config import CONFIG_FILE
from machine import cast_frozen_matrices, choose_device, choose_dtype
from model import DistilBertForSequenceClassification, load_pretrained
from options import Parser

CHUNK = 1024  # texts in memory at a time


def load_classifier(folder: Path, model: str | None, device_name: str, max_length: int) -> tuple[Forward, Tokenizer, list[str]]:
    """A classifier, its tokenizer, and the label names: the base model that the adapter names (or `model`) with the adapter
    merged in, or a whole model, such as --method full leaves.

    Raises UserError if the folder holds neither, or an adapter for another base model.
    """
    folder = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder)
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        if model is not None:
            raise UserError(f"{folder} is a whole model, which wants no base model: leave out --model")
        names = label_names(folder)
        base, tokenizer = load_pretrained(str(folder), len(names))
        return ready(base, device_name, max_length), tokenizer, names
    config, tensors = read_adapter(folder)
    name = config.base_model_name_or_path if model is None else model
    if name is None:
        raise UserError(f"{folder} does not say which model it was trained on: name it with --model")
    head = tensors.get(f"{PREFIX}classifier.weight")
    if head is None or head.dim() != 2:
        raise UserError(f"{folder} holds no classifier: it was trained for something else")
    names = [f"LABEL_{i}" for i in range(len(head))]  # as transformers calls them
    if (path := folder / "label_names.json").exists():
        names = read_json(path, list)
        if len(names) != len(head) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path} does not name the adapter's {len(head)} classes: write a list of as many strings")

    base, tokenizer = load_pretrained(name, len(head), config.revision if model is None else None)
    PeftModel.from_pretrained(base, folder).merge_and_unload()  # in float32; from here on LoRA costs nothing
    return ready(base, device_name, max_length), tokenizer, names


def label_names(model: Path) -> list[str]:
    """The classes' names as a whole model's config.json has them."""
    path = model / "config.json"
    names = read_json(path).get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{path} names no classes (id2label): it is a base model, and wants an adapter or training")
    return [str(names[str(i)]) for i in range(len(names))]


def ready(model: DistilBertForSequenceClassification, device_name: str, max_length: int) -> Forward:
    if not 3 <= max_length <= (longest := model.config.max_position_embeddings):
        raise UserError(f"--max-length is {max_length}; this model reads from 3 to {longest} tokens")
    device = choose_device(device_name)
    dtype = choose_dtype("auto", device)
    cast_frozen_matrices(model.requires_grad_(False).to(device), dtype)
    return Forward(model, device, dtype)


def label(
    forward: Forward, tokenizer: Tokenizer, names: list[str], texts: Iterable[str], max_length: int
) -> Iterator[dict[str, Any]]:
    """{"text", "label", "score", "scores"} for each text, in order, with CHUNK of them in memory at a time."""
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, CHUNK)):
        tokenized = tokenize(tokenizer, chunk, max_length)
        batches = evaluation_batches(tokenized.lengths, forward.tokens)
        logits = np.empty((len(chunk), len(names)), dtype=np.float32)
        logits[np.concatenate(batches)] = compute_logits(forward, tokenized, batches)  # back in the order of the texts
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))  # softmax
        scores /= scores.sum(axis=1, keepdims=True)
        for text, row in zip(chunk, scores.astype(float), strict=True):
            best = int(row.argmax())
            yield {"text": text, "label": names[best], "score": row[best], "scores": dict(zip(names, row, strict=True))}


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
    with progress(None, "predict", leave=False, quiet=quiet) as bar:
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
    return exit_status("predict.py", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
