"""Compare with transformers + peft: training, inference, memory, start-up, and the fraction of the machine's GEMM rate.

python bench/compare_peft.py                      on the embedded sample
python bench/compare_peft.py --dataset my/folder  on your own texts
python bench/compare_peft.py --tiny               a small model and two batches, to check that this script still runs

All sides start from the same random full-size DistilBERT and train with its dropout, r = 2 on q_lin and v_lin and the head,
AdamW, the same seed and the same maximum length. Each side runs in its own process, so that it does not inherit the heap and
the caches of another. The sides take turns batch by batch: a machine that slows down slows all of them. No network is needed.
"""

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.errors import run_cli

OURS, TUTORIAL = "plain-lora", "peft, tutorial"
LORA: dict[str, Any] = {
    "task_type": "SEQ_CLS",
    "r": 2,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_lin", "v_lin"],
}


class Side:
    """One way to train and label with the base model in `folder`: `step` trains on one batch, `label` labels texts."""

    micro_batching = False  # True: a batch goes through the model in micro-batches of at most TOKENS tokens, padding included
    lengths: Any  # of the training texts, in tokens
    labelling: Callable[[list[str]], Any] | None = None  # made by `labeller` at its first use

    def __init__(self, folder: Path, dataset: str, max_length: int):
        import torch

        from data import load_dataset
        from training.device import choose_dtype

        self.max_length, self.dtype = max_length, choose_dtype("auto", torch.device("cpu"))[0]
        data = load_dataset(dataset)
        self.train, self.num_labels = data.train, len(data.label_names)
        torch.manual_seed(0)
        self.model = self.build(folder)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.make_optimizer()
        self.model.train()

    def build(self, folder: Path) -> Any:
        raise NotImplementedError

    def make_optimizer(self) -> Any:
        raise NotImplementedError

    def logits(self, batch: Any) -> Any:
        raise NotImplementedError

    def labeller(self) -> Callable[[list[str]], Any]:
        """A function from texts to scores. It tokenises; its adapter is merged."""
        raise NotImplementedError

    def step(self, batch: Any) -> None:
        import torch
        import torch.nn.functional as F

        for micro_batch in split(self.lengths, batch) if self.micro_batching else [batch]:
            labels = torch.from_numpy(self.train.labels[micro_batch])
            (F.cross_entropy(self.logits(micro_batch), labels, reduction="sum") / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def label(self, texts: list[str]) -> None:
        """The first call merges the adapter."""
        self.labelling = self.labelling or self.labeller()
        self.labelling(texts)

    def about(self) -> tuple[Any, Any, Any]:
        """The lengths of the training texts, the network's configuration, the type of the frozen weights."""
        return self.lengths, self.model.get_base_model().config, self.dtype

    def peak_memory(self) -> float:
        """MB, since the process began."""
        import torch

        from training.device import peak_memory_mb

        return peak_memory_mb(torch.device("cpu")) or math.nan


class PlainLora(Side):
    """Like train.py: frozen weights in bfloat16, batches of similar length, at most 1,024 tokens at a time."""

    micro_batching = True

    def build(self, folder: Path) -> Any:
        import torch

        from data import tokenize
        from lora import LoraConfig, get_peft_model
        from model import load_pretrained
        from training.device import cast_frozen_matrices
        from training.evaluation import ModelRunner

        base, self.tokenizer = load_pretrained(str(folder), self.num_labels)
        self.texts = tokenize(self.tokenizer, self.train.texts, self.max_length)
        self.lengths = self.texts.lengths
        model = get_peft_model(base, LoraConfig(**LORA))
        cast_frozen_matrices(model, self.dtype)
        self.runner = ModelRunner(model, torch.device("cpu"), self.dtype)
        return model

    def make_optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def logits(self, batch: Any) -> Any:
        return self.runner(self.texts, batch)

    def labeller(self) -> Callable[[list[str]], Any]:
        import torch

        from training.evaluation import ModelRunner
        from training.inference import Classifier

        names = [str(i) for i in range(self.num_labels)]
        runner = ModelRunner(self.model.merge_and_unload(), torch.device("cpu"), self.dtype)
        classifier = Classifier(runner, self.tokenizer, names, self.max_length)
        return lambda texts: [list(answer["scores"].values()) for answer in classifier.label(texts)]


class Bfloat16(Side):
    """transformers + peft, frozen weights in bfloat16 under autocast, fused AdamW, whole batches of similar length (like
    Trainer with group_by_length), and the default attention, 'sdpa'; inference merged, in bfloat16, sorted by length."""

    attention = "sdpa"
    fused = True

    def build(self, folder: Path) -> Any:
        import numpy as np
        import peft
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=self.num_labels, attn_implementation=self.attention
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.ids = self.tokenizer(self.train.texts, truncation=True, max_length=self.max_length)["input_ids"]
        self.lengths = np.array([len(ids) for ids in self.ids])
        model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        return model

    def make_optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW(self.parameters, lr=1e-4, fused=self.fused)

    def logits(self, batch: Any) -> Any:
        import torch

        inputs = self.tokenizer.pad({"input_ids": [self.ids[i] for i in batch]}, return_tensors="pt")
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**inputs).logits.float()

    def labeller(self) -> Callable[[list[str]], Any]:
        import numpy as np
        import torch

        merged = self.model.merge_and_unload().eval().to(self.dtype)

        def label(texts: list[str]) -> Any:
            ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
            order = np.argsort([len(row) for row in ids], kind="stable")
            scores = torch.empty(len(texts), self.num_labels)
            with torch.inference_mode():
                for batch in np.array_split(order, math.ceil(len(order) / 32)):
                    inputs = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
                    scores[batch] = merged(**inputs).logits.float().softmax(dim=-1)
            return scores

        return label


class Tuned(Bfloat16):
    """Like bfloat16, and with this project's findings: parts of a batch, smaller caches of oneDNN, and the attention 'eager',
    which is faster on a CPU with dropout."""

    attention = "eager"
    micro_batching = True


class Tutorial(Bfloat16):
    """transformers + peft in float32, shuffled, padded to the longest of the batch; inference by pipeline, merged."""

    fused = False

    def build(self, folder: Path) -> Any:
        import torch

        self.dtype = torch.float32
        return super().build(folder)

    def labeller(self) -> Callable[[list[str]], Any]:
        import transformers

        merged = self.model.merge_and_unload().eval()
        pipeline = transformers.pipeline("text-classification", model=merged, tokenizer=self.tokenizer, top_k=None)
        return lambda texts: pipeline(texts, batch_size=32, truncation=True, max_length=self.max_length)


SIDES: dict[str, type[Side]] = {
    OURS: PlainLora,
    "peft, bfloat16": Bfloat16,
    "peft, tuned": Tuned,
    TUTORIAL: Tutorial,
}


def split(lengths: Any, batch: Any) -> list[Any]:
    from data import micro_batches
    from training.evaluation import TOKENS  # imports fast_cpu.py, which makes oneDNN's caches smaller

    return micro_batches(lengths, batch, TOKENS)


class Process:
    """A side in its own process, ready for its first step. An exception there is raised here again."""

    side: Side  # set in the other process

    def __init__(self, name: str, *about: Any):
        """`about` holds the arguments of the side's class."""
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, self.begin, (name, *about))
        self.lengths, self.config, self.dtype = self.ask("about")

    @staticmethod
    def begin(name: str, *about: Any) -> None:
        Process.side = SIDES[name](*about)

    @staticmethod
    def answer(method: str, *args: Any) -> Any:
        return getattr(Process.side, method)(*args)

    def ask(self, method: str, *args: Any) -> Any:
        return self.pool.submit(self.answer, method, *args).result()


class GemmRate:
    """The rate of the linear layers' products alone. No implementation on this machine can be faster."""

    def __init__(self, config: Any, dtype: Any):
        import torch

        self.d, self.h, self.layers, self.dtype = config.dim, config.hidden_dim, config.n_layers, dtype
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
        """FLOPs of a step's frozen linear layers. The last needs only keys and values, the first no gradient of its input."""
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
    """The longest batch, to warm up, and then `count` - 1 batches spread evenly over the lengths, or all of them.

    The few longest batches cost the most, above all in attention and memory. Only a whole epoch weighs them correctly.
    """
    count = 1 + min(count - 1, len(batches))
    order = sorted(batches, key=lambda batch: lengths[batch].max())
    picked = [order[round((i + 0.5) * len(order) / (count - 1) - 0.5)] for i in range(count - 1)]
    return [order[-1], *picked]


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from data import load_dataset, training_batches

    texts = load_dataset(options.dataset).test.texts[: options.texts]  # first, so that a mistyped name is reported at once
    sides: dict[str, Process] = {}
    starting: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(options.rounds):
        for name in SIDES:
            if name in sides:
                sides[name].pool.shutdown()
            start = time.perf_counter()
            sides[name] = Process(name, folder, options.dataset, options.max_length)
            starting[name].append(time.perf_counter() - start)

    lengths = sides[OURS].lengths
    similar = spread(training_batches(lengths, options.batch_size, seed=0, epoch=0), lengths, 1 + options.batches)
    shuffled = np.array_split(np.random.default_rng(0).permutation(len(lengths)), math.ceil(len(lengths) / options.batch_size))
    shuffled = spread(shuffled, lengths, 1 + options.batches)
    gemm = GemmRate(sides[OURS].config, sides[OURS].dtype)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    examples = dict.fromkeys(SIDES, 0)
    tokens = 0
    for number in range(len(similar)):
        for name, side in sides.items():
            batch = (shuffled if name == TUTORIAL else similar)[number]
            start = time.perf_counter()
            side.ask("step", batch)
            if number:  # the first batch warms up
                seconds[name].append(time.perf_counter() - start)
                examples[name] += len(batch)
        if number:
            sizes = [len(micro_batch) * int(lengths[micro_batch].max()) for micro_batch in split(lengths, similar[number])]
            tokens += sum(sizes)
            gemm.measure(max(sizes))
            print(f"batch {number}", *(f"{seconds[name][-1]:.2f} s" for name in SIDES), file=sys.stderr)
    memory = {name: side.ask("peak_memory") for name, side in sides.items()}

    labelling: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(1 + options.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side.ask("label", texts)
            if number:
                labelling[name].append(time.perf_counter() - start)
    rate = gemm.flops / gemm.seconds
    return {
        "training, examples/s": {name: examples[name] / sum(seconds[name]) for name in SIDES},
        "inference, texts/s": {name: len(texts) / statistics.mean(values) for name, values in labelling.items()},
        "peak memory of training, MB": memory,
        "seconds to the first step": {name: statistics.median(values) for name, values in starting.items()},
        "GEMM rate, GFLOP/s": rate / 1e9,
        "share of the GEMM rate": gemm.needed(tokens) / sum(seconds[OURS]) / rate,
    }


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
        "--batches", type=int, default=20, help="batches that each side trains on; a large number for the whole epoch [20]"
    )
    parser.add_argument("--texts", type=int, default=512, help="texts that each side labels [512]")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side labels and starts [3]")
    parser.add_argument("--output", type=Path, default=Path("compare_peft.json"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.texts, options.rounds, options.max_length = 2, 16, 1, 32
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "distilbert"
        make_checkpoint(folder, options.tiny)
        result = compare(folder, options)
    print(table(result))
    import peft
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    settings = {name: " ".join((side.__doc__ or "").split()) for name, side in SIDES.items()}
    header = {"settings": settings, "versions": versions, "machine": machine}
    header["options"] = {key: value for key, value in vars(options).items() if key != "output"} | {
        "dataset": Path(options.dataset).name
    }
    options.output.write_text(json.dumps(header | {"results": result}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_cli("compare_peft.py", main))
