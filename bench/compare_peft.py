"""Side by side with transformers + peft: training, inference, memory, start-up, and the share of the machine's GEMM rate.

python bench/compare_peft.py                      on the embedded sample
python bench/compare_peft.py --dataset my/folder  on your own texts
python bench/compare_peft.py --tiny               a small model and two batches: only to see that everything here still runs

All sides start from one random full-size DistilBERT, train with the dropouts of the checkpoint, r = 2 on q_lin and v_lin and
the head, AdamW, the same seed, and cut texts at the same length. They take turns, batch by batch, so that a machine that slows
down slows all of them. Memory and start-up are measured in processes of their own. No network is needed.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

SIDES = {
    "plain-lora": "as train.py does: frozen weights in bfloat16, batches of similar length, at most 1,024 tokens at a time",
    "peft, tuned": "transformers + peft, frozen weights in bfloat16 under autocast, fused AdamW, the very batches and parts of "
    "plain-lora, attention 'eager' (with dropout on a CPU faster than the default); inference merged, bfloat16, sorted",
    "peft, bfloat16": "the same with whole batches and the default attention, 'sdpa', as Trainer would with group_by_length",
    "peft, tutorial": "float32, shuffled, padded to the longest of the batch; inference by pipeline, merged",
}
OURS, TUNED, BFLOAT16, TUTORIAL = SIDES


class Side:
    """One way to train, a batch at a time by `step`, on the base model in `folder`; `labeller` makes it label."""

    def __init__(self, name: str, folder: Path, dataset: str, max_length: int):
        import torch

        from data import load_dataset
        from machine import choose_dtype

        self.name, self.folder, self.max_length = name, folder, max_length
        data = load_dataset(dataset)
        self.train, self.num_labels = data.train, len(data.label_names)
        self.dtype = torch.float32 if name == TUTORIAL else choose_dtype("auto", torch.device("cpu"))
        torch.manual_seed(0)
        self.build()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: Any
        if name == OURS:
            from optimizer import AdamW

            self.optimizer = AdamW([{"params": self.parameters, "lr": 1e-4}], weight_decay=0.01)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=name != TUTORIAL)
        self.model.train()

    def build(self) -> None:
        lora: dict[str, Any] = {
            "task_type": "SEQ_CLS",
            "r": 2,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": ["q_lin", "v_lin"],
        }
        self.model: Any
        self.tokenizer: Any
        if self.name == OURS:
            import torch

            from data import tokenize
            from evaluate import Forward
            from lora import LoraConfig, get_peft_model
            from machine import cast_frozen_matrices
            from model import load_pretrained

            base, self.tokenizer = load_pretrained(str(self.folder), self.num_labels)
            self.texts = tokenize(self.tokenizer, self.train.texts, self.max_length)
            self.lengths = self.texts.lengths
            self.model = get_peft_model(base, LoraConfig(**lora))
            cast_frozen_matrices(self.model, self.dtype)
            self.forward = Forward(self.model, torch.device("cpu"), self.dtype)
        else:
            import numpy as np
            import peft
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            attention = "eager" if self.name == TUNED else "sdpa"
            base = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.folder, num_labels=self.num_labels, attn_implementation=attention
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
            self.ids = self.tokenizer(self.train.texts, truncation=True, max_length=self.max_length)["input_ids"]
            self.lengths = np.array([len(ids) for ids in self.ids])
            self.model = peft.get_peft_model(base, peft.LoraConfig(**lora))
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(self.dtype)

    def logits(self, batch: Any) -> Any:
        if self.name == OURS:
            return self.forward(self.texts, batch)
        import torch

        inputs = self.tokenizer.pad({"input_ids": [self.ids[i] for i in batch]}, return_tensors="pt")
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**inputs).logits.float()

    def step(self, batch: Any) -> None:
        import torch
        import torch.nn.functional as F

        from data import micro_batches
        from evaluate import TOKENS

        for part in micro_batches(self.lengths, batch, TOKENS) if self.name in (OURS, TUNED) else [batch]:
            labels = torch.from_numpy(self.train.labels[part])
            (F.cross_entropy(self.logits(part), labels, reduction="sum") / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def labeller(side: Side) -> Callable[[list[str]], Any]:
    """From a trained side: texts -> scores, tokenising included, the adapter merged."""
    import numpy as np
    import torch

    merged = side.model.merge_and_unload().eval()
    if side.name == OURS:
        from evaluate import Forward
        from predict import label

        names = [str(i) for i in range(side.num_labels)]
        forward = Forward(merged, torch.device("cpu"), side.dtype)
        return lambda texts: [
            list(answer["scores"].values()) for answer in label(forward, side.tokenizer, names, texts, side.max_length)
        ]
    if side.name == TUTORIAL:
        import transformers

        pipeline = transformers.pipeline("text-classification", model=merged, tokenizer=side.tokenizer, top_k=None)
        return lambda texts: pipeline(texts, batch_size=32, truncation=True, max_length=side.max_length)

    merged.to(side.dtype)

    def label_sorted(texts: list[str]) -> Any:
        ids = side.tokenizer(texts, truncation=True, max_length=side.max_length)["input_ids"]
        order = np.argsort([len(row) for row in ids], kind="stable")
        scores = torch.empty(len(texts), side.num_labels)
        with torch.inference_mode():
            for part in np.array_split(order, math.ceil(len(order) / 32)):
                inputs = side.tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt")
                scores[part] = merged(**inputs).logits.float().softmax(dim=-1)
        return scores

    return label_sorted


class GemmRate:
    """The linear layers' products of one step, alone: what no implementation on this machine can go below."""

    def __init__(self, side: Side):
        import torch

        config = side.model.get_base_model().config
        self.d, self.h, self.layers, self.dtype = config.dim, config.hidden_dim, config.n_layers, side.dtype
        self.flops, self.seconds = 0.0, 0.0
        self.weights = [torch.randn(shape).to(self.dtype) for shape in [(self.d, self.d), (self.h, self.d), (self.d, self.h)]]

    def measure(self, tokens: int) -> None:
        import torch
        import torch.nn.functional as F

        for weight in self.weights:
            x, y = (torch.randn(tokens, n).to(self.dtype) for n in reversed(weight.shape))
            for product in (lambda x=x, w=weight: F.linear(x, w), lambda y=y, w=weight: y @ w):  # forward, backward
                product()
                start = time.perf_counter()
                product()
                self.seconds += time.perf_counter() - start
                self.flops += 2 * tokens * weight.numel()

    def needed(self, tokens: int) -> float:
        """FLOPs of a step's frozen linear layers: of the last layer keys and values only, and no gradient of the input."""
        block = 4 * self.d**2 + 2 * self.d * self.h
        forward = (self.layers - 1) * block + 2 * self.d**2
        return 2.0 * tokens * (2 * forward - 3 * self.d**2)


def make_checkpoint(folder: Path, tiny: bool) -> None:
    import torch

    from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained

    torch.manual_seed(0)
    small = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128} if tiny else {}
    tokenizer = load_pretrained("minilm", 4)[1]
    save_pretrained(DistilBertForSequenceClassification(DistilBertConfig(num_labels=4, **small)), tokenizer, folder)


def spread(batches: list[Any], lengths: Any, count: int) -> list[Any]:
    """The longest of the batches, to warm up, and then `count` - 1 spread evenly through the lengths, or all of them.

    The few longest cost the most, above all where attention or memory grows with them: only a whole epoch weighs them right.
    """
    count = 1 + min(count - 1, len(batches))
    order = sorted(batches, key=lambda batch: lengths[batch].max())
    picked = [order[round((i + 0.5) * len(order) / (count - 1) - 0.5)] for i in range(count - 1)]
    return [order[-1], *picked]


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from data import load_dataset, micro_batches, training_batches
    from evaluate import TOKENS

    sides = {name: Side(name, folder, options.dataset, options.max_length) for name in SIDES}
    lengths = sides[OURS].lengths
    alike = spread(training_batches(lengths, options.batch_size, seed=0, epoch=0), lengths, 1 + options.batches)
    shuffled = np.array_split(np.random.default_rng(0).permutation(len(lengths)), math.ceil(len(lengths) / options.batch_size))
    shuffled = spread(shuffled, lengths, 1 + options.batches)
    gemm = GemmRate(sides[OURS])
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    examples = dict.fromkeys(SIDES, 0)
    tokens = 0
    for number in range(len(alike)):
        for name, side in sides.items():
            batch = (shuffled if name == TUTORIAL else alike)[number]
            start = time.perf_counter()
            side.step(batch)
            if number:  # the first is there to warm up
                seconds[name].append(time.perf_counter() - start)
                examples[name] += len(batch)
        if number:
            sizes = [len(part) * int(lengths[part].max()) for part in micro_batches(lengths, alike[number], TOKENS)]
            tokens += sum(sizes)
            gemm.measure(max(sizes))
            print(f"batch {number}", *(f"{seconds[name][-1]:.2f} s" for name in SIDES), file=sys.stderr)
    rate = gemm.flops / gemm.seconds
    result: dict[str, Any] = {
        "training, examples/s": {name: examples[name] / sum(seconds[name]) for name in SIDES},
        "GEMM rate, GFLOP/s": rate / 1e9,
        "share of the GEMM rate": gemm.needed(tokens) / sum(seconds[OURS]) / rate,
    }

    texts = load_dataset(options.dataset).test.texts[: options.texts]
    labellers = {name: labeller(side) for name, side in sides.items()}
    labelled: dict[str, list[float]] = {name: [] for name in labellers}
    for number in range(1 + options.rounds):
        for name, label in labellers.items():
            start = time.perf_counter()
            label(texts)
            if number:
                labelled[name].append(time.perf_counter() - start)
    result["inference, texts/s"] = {name: len(texts) / statistics.mean(values) for name, values in labelled.items()}
    return result


def measure_alone(what: str, name: str, folder: Path, options: argparse.Namespace) -> float:
    """`what` of one side in a process of its own: its peak memory in MB, or the seconds until its first step."""
    command = [sys.executable, __file__, "--measure", what, "--side", name, "--checkpoint", str(folder)]
    for option in ("dataset", "batch_size", "max_length", "batches"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    value = float(done.stdout.split()[-1])
    return value - start if what == "start-up" else value


def measure(options: argparse.Namespace) -> None:
    import torch

    side = Side(options.side, options.checkpoint, options.dataset, options.max_length)
    if options.measure == "memory":
        from data import training_batches
        from machine import peak_memory_mb

        for batch in spread(
            training_batches(side.lengths, options.batch_size, seed=0, epoch=0), side.lengths, 1 + options.batches
        ):
            side.step(batch)
        print(peak_memory_mb(torch.device("cpu")))
    else:
        print(time.time())


def table(result: dict[str, Any]) -> str:
    names = list(SIDES)
    lines = [["", *names, *(f"{OURS} against {name}" for name in names[1:])]]
    lines.append(["---"] * len(lines[0]))
    for what, values in result.items():
        if isinstance(values, dict):
            ratios = [f"{values[OURS] / values[name]:.2f}x" if name in values else "" for name in names[1:]]
            lines.append([what, *(f"{values[name]:,.1f}" if name in values else "" for name in names), *ratios])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    share, rate = result["share of the GEMM rate"], result["GEMM rate, GFLOP/s"]
    return f"{rows}\n\n{OURS} trains at {share:.0%} of the {rate:.0f} GFLOP/s that GEMMs of these shapes reach on this machine."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sample", help="as for train.py [sample]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument(
        "--batches", type=int, default=20, help="of an epoch that each side trains on; a large number for the whole"
    )
    parser.add_argument("--texts", type=int, default=512, help="that each side labels")
    parser.add_argument("--rounds", type=int, default=3, help="of labelling, and starts of each side")
    parser.add_argument("--output", type=Path, default=Path("compare_peft.json"))
    parser.add_argument("--tiny", action="store_true")
    for inner, kind in [("measure", str), ("side", str), ("checkpoint", Path)]:
        parser.add_argument(f"--{inner}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options)
    if options.tiny:
        options.batches, options.texts, options.rounds, options.max_length = 2, 16, 1, 32
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "distilbert"
        make_checkpoint(folder, options.tiny)
        result = compare(folder, options)
        result["peak memory of training, MB"] = {name: measure_alone("memory", name, folder, options) for name in SIDES}
        result["seconds to the first step"] = {
            name: statistics.median(measure_alone("start-up", name, folder, options) for _ in range(options.rounds))
            for name in SIDES
        }
    print(table(result))
    import peft
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    about = {"settings": SIDES, "versions": versions, "machine": machine}
    about["options"] = {
        key: value for key, value in vars(options).items() if key not in ("measure", "side", "checkpoint", "output")
    }
    options.output.write_text(json.dumps(about | {"results": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
