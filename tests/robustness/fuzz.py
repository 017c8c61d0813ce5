"""Damaged input by the thousand: each is read correctly or refused with the project's one class of error.

python tests/robustness/fuzz.py      20,000 inputs, some minutes; stops at the first that is neither, and keeps it
python tests/robustness/fuzz.py --count 500 --seed 7 --only "model.safetensors"

If it is read, the result is checked. No input may leave a file behind, or take 10 s or 2 GB.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import random
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import safetensors.torch
import torch
from helpers import begun
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from common.errors import UserError
from data import load_dataset, read_texts, tokenize
from data.datasets import SAMPLE
from lora import LoraConfig, PeftModel, get_peft_model
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained
from reporting.sections import report_page
from training.checkpoint import newest_first, read_newest
from training.evaluation import ModelRunner, compute_logits
from training.options import Options, parse

SECONDS, BYTES = 10, 2 << 30
TOKENS = [b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b'"', b"\\", b",", b"\n", b"\r", b"\0", b"\xff"]
TOKENS += [
    b"9" * 40,
    b"[" * 2000,
    b'"\\ud800"',
    "\u202eabc\u202c".encode(),
    "\N{SAUROPOD}".encode(),
    b"\xef\xbb\xbf",
    b"../../x",
]
TOKENS += [b"1" * 5000, b"a" * 100_000, (1 << 60).to_bytes(8, "little"), (1 << 63).to_bytes(8, "little"), b"\xff" * 8]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four small damages."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(content) + 1) if rng.random() < 0.7 else min(len(content), rng.randrange(64))
        end = min(len(content), at + rng.choice([0, 1, 1, 4, 8, 50, 1000]))
        kind = rng.randrange(6)
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[end:]
        elif kind == 2:
            content = content[:at] + rng.choice(TOKENS) + content[end:]
        elif kind == 3:
            content = content[:end] + content[at:end] * rng.choice([1, 2, 20]) + content[end:]
        elif kind == 4:
            content = content[:at]
        else:
            content = content[:at] + rng.randbytes(end - at) + content[end:]
    return content


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Another value at a random place of the JSON object, or damage as above."""
    if rng.random() < 0.4:
        return mutate(content, rng)
    value = json.loads(content)
    place = value
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        others = [
            None,
            True,
            0,
            -1,
            1,
            1 << 70,
            1.5,
            1e308,
            float("nan"),
            "",
            "x",
            "\ud800",
            "../..",
            [],
            {},
            [[]],
            {"a": 1},
            [0],
        ]
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(others)
        return json.dumps(value).encode()


class Target:
    """A file in a folder of whole ones, and its reader: `read` checks the result, or raises UserError."""

    def __init__(self, path: Path, read: Callable[[], object], change: Callable[[bytes, random.Random], bytes] = mutate):
        self.path, self.read, self.change, self.whole = path, read, change, path.read_bytes()

    def attempt(self, rng: random.Random) -> bytes:
        content = self.change(self.whole, rng)
        self.path.write_bytes(content)
        return content

    def restore(self) -> None:
        self.path.write_bytes(self.whole)


def tiny_tokenizer() -> Tokenizer:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


def targets(root: Path) -> dict[str, Target]:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=64, max_position_embeddings=16, dim=8, n_layers=1, n_heads=2, hidden_dim=8, num_labels=4
    )
    model, tokenizer = DistilBertForSequenceClassification(config).eval(), tiny_tokenizer()
    save_pretrained(model, tokenizer, root / "model")

    def use(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
        texts = tokenize(tokenizer, ["a b c", "\N{SAUROPOD}", "word " * 50], 16)
        logits = compute_logits(ModelRunner(model, torch.device("cpu"), torch.float32), texts, [np.arange(3)])
        assert logits.shape == (3, 4)
        assert np.isfinite(logits).all()

    def read_model() -> None:
        use(*load_pretrained(str(root / "model"), 4))

    base, _ = load_pretrained(str(root / "model"), 4)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_lin", "v_lin"]))
    peft.save_pretrained(root / "adapter")

    def read_adapter() -> None:
        fresh, _ = load_pretrained(str(root / "whole"), 4)
        use(PeftModel.from_pretrained(fresh, root / "adapter"), tokenizer)

    save_pretrained(model, tokenizer, root / "whole")

    run = root / "run"
    run.mkdir()
    metadata = {
        "options": {},
        "model": "m",
        "commit": None,
        "dataset": "d",
        "notice": "",
        "processes": 1,
        "fingerprint": {},
        "before": [[1]],
    }
    checkpoints = begun(run, peft, metadata)
    for step in (1, 2):
        checkpoints.save(step, 0.0, [])
    newest, other = newest_first(run)
    whole = safetensors.torch.load(newest.read_bytes())  # load_file would only map the file that is about to change

    def read_checkpoint() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            checkpoint = read_newest(run)
        assert checkpoint.step == (2 if checkpoint.path == newest else 1)
        assert checkpoint.path in (newest, other)
        assert all(torch.equal(tensor, whole[key]) for key, tensor in checkpoint.tensors.items())

    scores = {"macro_f1": 0.5, "accuracy": 0.5, "confusion_matrix": [[1, 0], [1, 0]], "per_class_f1": {"a": 0.5, "b": None}}
    results = {
        **{"model": "m", "dataset": "d", "dtype": "float32", "device": "cpu", "processes": 1, "commit": None},
        **{"sha256": {"weights": "0", "data": "0"}, "versions": {"torch": "2"}, "before": scores, "after": scores},
        "options": {
            "epochs": 1,
            "max_length": 16,
            "r": 2,
            "seed": 0,
            "train_limit": None,
            "test_limit": None,
            "revision": None,
            "method": "head",
        },
        "embedded": False,
        "parameters": {"trainable": 1, "all": 2, "percent": 50.0},
        "train": {"examples": 4, "steps": 1, "seconds": 1.5, "examples_per_second": 2.7},
    }
    ended = root / "ended" / "results.json"
    ended.parent.mkdir()
    ended.write_text(json.dumps(results))

    def read_results() -> None:
        assert "<script" not in report_page(ended.parent, None)

    lines = (SAMPLE / "train.jsonl").read_text().splitlines()
    lines = [line for label in range(4) for line in [line for line in lines if json.loads(line)["label"] == label][:2]]
    rows = [json.loads(line) for line in lines]
    files = {
        "train.jsonl": "".join(line + "\n" for line in lines),
        "train.csv": "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows),
        "train.csv of AG News": "".join(f'"{row["label"] + 1}","{row["text"]}","more"\n' for row in rows),
    }

    def dataset_reader(path: Path) -> Callable[[], None]:
        def read() -> None:
            data = load_dataset(str(path.parent))
            assert len(data.train.texts) == len(data.train.labels) > 0
            assert 0 <= data.train.labels.min() <= data.train.labels.max() < len(data.label_names)
            assert all(text.strip() and text.encode() for text in data.train.texts)
            if path.suffix == ".jsonl":
                said = [
                    json.loads(line) for line in re.split(r"\r\n?|\n", path.read_bytes().decode("utf-8-sig")) if line.strip()
                ]
                assert data.train.texts == [row["text"] for row in said]

        return read

    def texts_reader(path: Path) -> Callable[[], None]:
        def read() -> None:
            for text in read_texts(path):
                text.encode()

        return read

    by_name = {
        "config.json": Target(root / "model" / "config.json", read_model, mutate_json),
        "model.safetensors": Target(root / "model" / "model.safetensors", read_model),
        "tokenizer.json": Target(root / "model" / "tokenizer.json", read_model, mutate_json),
        "adapter_config.json": Target(root / "adapter" / "adapter_config.json", read_adapter, mutate_json),
        "adapter_model.safetensors": Target(root / "adapter" / "adapter_model.safetensors", read_adapter),
        "checkpoint": Target(newest, read_checkpoint),
        "results.json": Target(ended, read_results, mutate_json),
    }
    for name, content in files.items():
        path = root / name.replace(" ", "-") / name.split()[0]
        path.parent.mkdir()
        path.write_text(content)
        path.with_name("test" + path.suffix).write_text(content)
        by_name[name] = Target(path, dataset_reader(path))
        if "AG News" not in name:
            by_name[f"texts of {name}"] = Target(path, texts_reader(path))
    command = root / "command line"
    command.write_text(
        "--r 4 --lora-alpha 8 --target-modules q_lin k_lin --epochs 1 --seed 3 --warmup 0.5 --dtype auto --use-dora"
    )

    def read_command() -> None:
        with contextlib.suppress(SystemExit):  # --help
            Options(**parse(command.read_text(errors="surrogateescape").split(" "), None))

    by_name["command line"] = Target(command, read_command)
    return by_name


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """No hang and no memory out of proportion."""

    def too_slow(*_: object) -> None:
        raise AssertionError(f"took {SECONDS} s")

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    faulthandler.dump_traceback_later(12 * SECONDS, exit=True, repeat=False)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(count: int, seed: int, only: str | None = None) -> Counter:
    """Try `count` inputs. Returns how many of each kind were read and refused; AssertionError at the first that is neither."""
    rng, outcomes = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        by_name = targets(root)
        names = [only] if only else list(by_name)
        for number in range(count):
            name = names[number % len(names)]
            target = by_name[name]
            content = target.attempt(rng)
            before = sorted(root.rglob("*"))
            try:
                with limits():
                    target.read()
                outcomes[name, "read"] += 1
            except UserError:
                outcomes[name, "refused"] += 1
            except BaseException as error:
                kept = Path(tempfile.gettempdir()) / f"fuzz-{target.path.name}"
                kept.write_bytes(content)
                raise AssertionError(f"input {number}, {name}, kept as {shlex.quote(str(kept))}: {error!r}") from error
            finally:
                target.restore()
            assert sorted(root.rglob("*")) == before, f"input {number}, {name}, left files behind"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the name of one kind of input")
    options = parser.parse_args()
    start = time.monotonic()
    outcomes = fuzz(options.count, options.seed, options.only)
    for name in sorted({name for name, _ in outcomes}):
        print(f"{name:<40} {outcomes[name, 'read']:>6} read {outcomes[name, 'refused']:>6} refused")
    print(f"{options.count:,} inputs in {time.monotonic() - start:.0f} s: none crashed, hung, lied or left a file behind")


if __name__ == "__main__":
    main()
