"""What each part of training/fast_cpu.py buys: the share of the speed that is lost when it is left out.

python bench/tricks.py          a random DistilBERT with r = 2 on q_lin and v_lin, 16 texts of 64 tokens at a time
python bench/tricks.py --tiny   a small model, to check that this script still runs

The variants take turns, and the fastest of several turns counts. Types that this processor lacks are left out.
"""

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from lora import LoraConfig, get_peft_model
from model import DistilBertConfig, DistilBertForSequenceClassification
from training.device import cast_frozen_matrices, dtype_name
from training.fast_cpu import Fast, can_pack, limit_caches

PARTS: dict[str, Any] = {"packed weights": F.linear, "dropout": F.dropout, "attention": F.scaled_dot_product_attention}


def variants(dtype: torch.dtype, size: dict[str, int]) -> dict[str, tuple[nn.Module, Fast]]:
    torch.manual_seed(0)
    model = get_peft_model(
        DistilBertForSequenceClassification(DistilBertConfig(num_labels=4, **size)),
        LoraConfig(r=2, lora_alpha=16, lora_dropout=0.1, target_modules=["q_lin", "v_lin"]),
    )
    cast_frozen_matrices(model, dtype)
    made = {name: Fast(model, dtype) for name in ("all", *PARTS, "none of them")}
    for name, part in PARTS.items():
        del made[name].functions[part]
    made["none of them"].functions.clear()
    return {name: (model, fast) for name, fast in made.items()}


def seconds(model: nn.Module, fast: Fast, dtype: torch.dtype, train: bool, batch: tuple[torch.Tensor, ...]) -> float:
    ids, mask, labels = batch
    model.train(train)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), fast, torch.set_grad_enabled(train):
        logits = model(ids, mask).float()
    if train:
        F.cross_entropy(logits, labels).backward()
    return time.perf_counter() - start


def run(tiny: bool, rounds: int) -> list[str]:
    size: dict[str, int] = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128} if tiny else {}
    ids = torch.randint(1000, 30000, (16, 64))
    mask = (torch.arange(64) < torch.randint(40, 65, (16, 1))).long()
    batch = ids, mask, torch.randint(0, 4, (16,))
    types = [torch.float32, *([torch.bfloat16] if can_pack() else []), torch.int8]
    lines = ["| arithmetic | | all, texts/s | " + " | ".join(f"without {name}" for name in PARTS) + " | without any |"]
    lines.append("|---" * (len(PARTS) + 4) + "|")
    for dtype in types:
        made = variants(dtype, size)
        for train in (True, False):
            best = dict.fromkeys(made, float("inf"))
            for _ in range(rounds):
                for name, (model, fast) in made.items():
                    best[name] = min(best[name], seconds(model, fast, dtype, train, batch))
            lost: list[Any] = [f"{100 * (best['all'] / taken - 1):+.0f} %" for name, taken in best.items() if name != "all"]
            what = "training" if train else "labelling"
            lines.append(" | ".join([f"| {dtype_name(dtype)}", what, f"{16 / best['all']:.1f}", *lost]) + " |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    limit_caches()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n".join(run(options.tiny, 1 if options.tiny else options.rounds)))


if __name__ == "__main__":
    main()
