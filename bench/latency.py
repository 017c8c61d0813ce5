"""Latency of one text on trained models: `predict` in a loop beside transformers' pipeline, and the server of docs/server.md.

python bench/latency.py                        on the embedded encoder, with a random head: the time does not depend on it
python bench/latency.py --model FOLDER         on another model

One call at a time, and from eight threads at once. Both sides run in this process, on the same merged model and the same texts,
and take turns. The server is the code of the document, on another port, with one client and with four.
"""

import argparse
import http.client
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data import load_dataset
from model import load_pretrained, save_pretrained
from train import load

ROOT = Path(__file__).resolve().parent.parent


def milliseconds(call: Callable[[str], object], texts: list[str], callers: int) -> list[float]:
    """How long each call takes, with so many callers at once, each of which goes through its share of the texts."""

    def go_through(share: list[str]) -> list[float]:
        taken = []
        for text in share:
            start = time.perf_counter()
            call(text)
            taken.append(1000 * (time.perf_counter() - start))
        return taken

    with ThreadPoolExecutor(callers) as pool:
        return [one for taken in pool.map(go_through, (texts[i::callers] for i in range(callers))) for one in taken]


def row(name: str, callers: int, taken: list[float], seconds: float) -> str:
    p95 = sorted(taken)[int(0.95 * len(taken))]
    return f"| {name} | {callers} | {statistics.median(taken):.1f} | {p95:.1f} | {len(taken) / seconds:.1f} |"


def serve(folder: Path) -> int:
    """Start the server of docs/server.md in a thread. Returns its port."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "server.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {}
    for present, wanted in ('"tickets"', repr(str(folder))), ("8000", "0"), ("server.serve_forever()", ""):
        assert present in code, f"docs/server.md has no {present} any more"
        code = code.replace(present, wanted)
    exec(code, names)
    names["Handler"].log_message = lambda *_: None
    threading.Thread(target=names["server"].serve_forever, daemon=True).start()
    return names["server"].server_address[1]


class Client(threading.local):
    """A connection for each thread."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port)

    def ask(self, text: str) -> Any:
        self.connection.request("POST", "/", json.dumps([text]))
        return json.loads(self.connection.getresponse().read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="folder or hub id of the encoder [the embedded one]")
    parser.add_argument("--texts", type=int, default=96, help="calls in each measurement [96]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side [3]")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch's threads in one call [its default]"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import pipeline

    texts = load_dataset("sample").train.texts[: options.texts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "merged"
        save_pretrained(*load_pretrained(options.model, num_labels=4), folder)
        classifier, pipe = (
            load(folder, device="cpu", dtype="float32"),
            pipeline("text-classification", str(folder), device="cpu"),
        )
        client = Client(serve(folder))
        sides: list[tuple[str, Callable[[str], object], int]] = [
            ("plain-lora, predict", lambda text: classifier.predict([text]), 1),
            ("transformers, pipeline", pipe, 1),
            ("plain-lora, predict", lambda text: classifier.predict([text]), 8),
            ("transformers, pipeline", pipe, 8),
            ("the server", client.ask, 1),
            ("the server", client.ask, 4),
        ]
        taken: list[list[float]] = [[] for _ in sides]
        seconds = [0.0] * len(sides)
        for turn in range(options.rounds + 1):
            for i, (_, call, callers) in enumerate(sides):
                start = time.perf_counter()
                measured = milliseconds(call, texts, callers)
                if turn:  # the first is a warm-up
                    taken[i] += measured
                    seconds[i] += time.perf_counter() - start
    print(f"{options.threads} threads of torch, {options.rounds} x {len(texts)} texts each")
    print("| | callers | median, ms | p95, ms | texts/s |\n|---|---|---|---|---|")
    for (name, _, callers), times, total in zip(sides, taken, seconds, strict=True):
        print(row(name, callers, times, total))


if __name__ == "__main__":
    main()
