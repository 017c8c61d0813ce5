"""What compare_peft.py compares: ways to train, and ways to label. Each runs in a process of its own.

Their imports are inside the functions: the seconds from a process's start to its first step or label are measured, too.
"""

import math
import os
import queue
import threading
from pathlib import Path
from typing import Any

LORA: dict[str, Any] = {
    "task_type": "SEQ_CLS",
    "r": 2,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_lin", "v_lin"],
}
OURS = "plain-lora"
BATCH = 32  # texts that a peer labels at a time


class Training:
    """One way to train the base model in `folder` on a data set: `step` trains on one batch."""

    name: str
    arithmetics: tuple[str, ...]  # to try; the frozen weights have this type
    shows_fastest = True  # False: every arithmetic is shown, not only the fastest on this machine
    micro_batching = False  # True: a batch goes through the model in micro-batches of at most TOKENS tokens, padding included
    lengths: Any  # of the training texts, in tokens

    def __init__(self, folder: Path, dataset: str, max_length: int, arithmetic: str):
        import torch

        from data import load_dataset

        self.folder, self.max_length, self.dtype = folder, max_length, getattr(torch, arithmetic)
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
        import torch

        return torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def logits(self, batch: Any) -> Any:
        raise NotImplementedError

    def prepare(self, batches: list[Any]) -> None:
        """These are the batches that `step` will get."""

    def step(self, batch: Any) -> None:
        import torch
        import torch.nn.functional as F

        for micro_batch in split(self.lengths, batch) if self.micro_batching else [batch]:
            labels = torch.from_numpy(self.train.labels[micro_batch])
            (F.cross_entropy(self.logits(micro_batch), labels, reduction="sum") / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_memory(self) -> float:
        """MB, since the process began."""
        import torch

        from training.device import peak_memory_mb

        return peak_memory_mb(torch.device("cpu")) or math.nan


def split(lengths: Any, batch: Any) -> list[Any]:
    from data import micro_batches
    from training.evaluation import TOKENS

    return micro_batches(lengths, batch, TOKENS)


class PlainLora(Training):
    """Like train.py: batches of similar length, at most 1,024 tokens at a time."""

    name = OURS
    arithmetics: tuple[str, ...] = ("float32", "bfloat16", "int8")
    shows_fastest = False
    micro_batching = True

    def build(self, folder: Path) -> Any:
        import torch

        from data import tokenize
        from lora import LoraConfig, get_peft_model
        from model import load_pretrained
        from training.device import cast_frozen_matrices
        from training.evaluation import ModelRunner
        from training.fast_cpu import limit_caches

        limit_caches()
        base, tokenizer = load_pretrained(str(folder), self.num_labels)
        self.texts = tokenize(tokenizer, self.train.texts, self.max_length)
        self.lengths = self.texts.lengths
        model = get_peft_model(base, LoraConfig(**LORA))
        cast_frozen_matrices(model, self.dtype)
        self.runner = ModelRunner(model, torch.device("cpu"), self.dtype)
        return model

    def logits(self, batch: Any) -> Any:
        return self.runner(self.texts, batch)


class Peft(Training):
    """transformers + peft with fused AdamW, whole batches of similar length, and the default attention, 'sdpa'."""

    name = "peft"
    arithmetics: tuple[str, ...] = ("float32", "bfloat16")
    attention = "sdpa"

    def build(self, folder: Path) -> Any:
        import numpy as np
        import peft

        base, self.tokenizer = load_transformers(folder, attn_implementation=self.attention)
        self.ids = self.tokenizer(self.train.texts, truncation=True, max_length=self.max_length)["input_ids"]
        self.lengths = np.array([len(ids) for ids in self.ids])
        model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        return model

    def logits(self, batch: Any) -> Any:
        import torch

        inputs = self.tokenizer.pad({"input_ids": [self.ids[i] for i in batch]}, return_tensors="pt")
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**inputs).logits.float()


class Tuned(Peft):
    """The same with this project's findings: parts of a batch, smaller caches of oneDNN, and the attention 'eager', which is
    faster on a CPU with dropout."""

    name = "peft, tuned"
    attention = "eager"
    micro_batching = True

    def build(self, folder: Path) -> Any:
        from training.fast_cpu import limit_caches

        limit_caches()
        return super().build(folder)


class Tutorial(Peft):
    """transformers + peft in a loop as tutorials have it: shuffled, padded to the longest of the batch, AdamW not fused."""

    name = "peft, tutorial's loop"
    arithmetics: tuple[str, ...] = ("float32",)

    def make_optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW(self.parameters, lr=1e-4)


class WithTrainer(Tutorial):
    """transformers' Trainer with peft and Trainer's own defaults: shuffled, padded to the longest of the batch."""

    name = "peft, Trainer"

    def prepare(self, batches: list[Any]) -> None:
        """Start `Trainer.train` in a thread. It waits before each step until `step` is called."""
        import transformers

        self.go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        go, done = self.go, self.done

        class TakeTurns(transformers.TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                go.get()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                done.put(None)
                go.get()

        def train() -> None:
            try:
                trainer.train()
            except BaseException as error:
                done.put(error)

        arguments = transformers.TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            max_steps=len(batches),
            per_device_train_batch_size=len(batches[0]),
            train_sampling_strategy="sequential",  # the batches were shuffled already
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = [{"input_ids": self.ids[i], "labels": int(self.train.labels[i])} for batch in batches for i in batch]
        trainer = transformers.Trainer(
            self.model, arguments, train_dataset=rows, processing_class=self.tokenizer, callbacks=[TakeTurns()]
        )
        threading.Thread(target=train, daemon=True).start()

    def step(self, batch: Any) -> None:
        self.go.put(None)
        if error := self.done.get():
            raise error


class Labelling:
    """One way to label with the whole model in `folder`, to which a merged adapter was saved."""

    name: str
    arithmetics: tuple[str, ...]
    shows_fastest = True

    def __init__(self, folder: Path, max_length: int, arithmetic: str):
        self.max_length, self.arithmetic = max_length, arithmetic
        self.load(folder)

    def load(self, folder: Path) -> None:
        raise NotImplementedError

    def label(self, texts: list[str]) -> Any:
        """The scores (N, C) of N texts. It tokenises."""
        raise NotImplementedError

    def set_threads(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)


class PlainLoraLabels(Labelling):
    """Like predict.py."""

    name = OURS
    arithmetics: tuple[str, ...] = ("float32", "bfloat16", "int8")
    shows_fastest = False

    def load(self, folder: Path) -> None:
        from training.inference import load_classifier

        self.classifier = load_classifier(folder, device="cpu", max_length=self.max_length, dtype=self.arithmetic)

    def label(self, texts: list[str]) -> Any:
        import numpy as np

        return np.array([list(answer["scores"].values()) for answer in self.classifier.label(texts)])


class Pipeline(Labelling):
    """transformers' pipeline, as tutorials have it."""

    name = "transformers, pipeline"
    arithmetics: tuple[str, ...] = ("float32",)

    def load(self, folder: Path) -> None:
        import transformers

        model, tokenizer = load_transformers(folder)
        self.names = list(model.config.label2id)
        self.pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)

    def label(self, texts: list[str]) -> Any:
        import numpy as np

        answers: Any = self.pipeline(texts, batch_size=BATCH, truncation=True, max_length=self.max_length)
        scores = [{one["label"]: one["score"] for one in answer} for answer in answers]
        return np.array([[row[name] for name in self.names] for row in scores])


class Transformers(Labelling):
    """transformers, with texts sorted by length."""

    name = "transformers, sorted"
    arithmetics: tuple[str, ...] = ("float32", "bfloat16")

    def load(self, folder: Path) -> None:
        import torch

        self.model, self.tokenizer = load_transformers(folder)
        self.model.to(getattr(torch, self.arithmetic))

    def label(self, texts: list[str]) -> Any:
        import numpy as np

        ids = self.token_ids(texts)
        order = np.argsort([len(row) for row in ids], kind="stable")
        batches = np.array_split(order, math.ceil(len(order) / BATCH))
        logits = np.concatenate([self.logits([ids[i] for i in batch]) for batch in batches])
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (scores / scores.sum(axis=1, keepdims=True))[np.argsort(order)]

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def logits(self, ids: list[list[int]]) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(**self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits.float().numpy()


class QuantizeDynamic(Transformers):
    """The same after torch.ao.quantization.quantize_dynamic."""

    name = "transformers, quantize_dynamic"
    arithmetics: tuple[str, ...] = ("int8",)

    def load(self, folder: Path) -> None:
        import torch

        model, self.tokenizer = load_transformers(folder)
        self.model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})


class OnnxRuntime(Transformers):
    """ONNX Runtime, with texts sorted by length; int8 by its own quantize_dynamic, per channel."""

    name = "ONNX Runtime"
    arithmetics: tuple[str, ...] = ("float32", "int8")
    shows_fastest = False

    def load(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder, self.tokenizer = folder, Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.max_length)
        self.set_threads(int(os.environ.get("OMP_NUM_THREADS", "0")))  # like torch; 0 is as many as there are cores

    def set_threads(self, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = self.folder / f"{self.arithmetic}.onnx"
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]

    def logits(self, ids: list[list[int]]) -> Any:
        import numpy as np

        lengths = np.array([len(row) for row in ids])
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded = np.zeros(mask.shape, dtype=np.int64)
        padded[mask] = np.concatenate(ids)
        return self.session.run(None, {"input_ids": padded, "attention_mask": mask.astype(np.int64)})[0]


def load_transformers(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The classifier, in evaluation mode, and its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def export_onnx(folder: Path) -> None:
    """Write float32.onnx and int8.onnx into the folder of a whole model."""
    import logging

    import torch
    from onnxruntime.quantization import quantize_dynamic

    logging.disable(logging.WARNING)
    model, tokenizer = load_transformers(folder)
    inputs = dict(tokenizer(["one text", "and another"], padding=True, return_tensors="pt", return_token_type_ids=False))
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}  # any number of texts and tokens
    shapes = dict.fromkeys(inputs, sizes)
    torch.onnx.export(model, kwargs=inputs, f=folder / "float32.onnx", dynamic_shapes=shapes, verbose=False)
    quantize_dynamic(folder / "float32.onnx", folder / "int8.onnx", per_channel=True)


TRAINING = [PlainLora, Peft, Tuned, Tutorial, WithTrainer]
LABELLING = [PlainLoraLabels, Pipeline, Transformers, QuantizeDynamic, OnnxRuntime]
