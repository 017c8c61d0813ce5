"""A trained classifier: from a folder (training/trained_folder.py) and new texts to labels and scores."""

import queue
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from common.errors import UserError
from common.files import new_folder, writing
from data import Row, evaluation_batches, slices, tokenize
from training.device import DTYPES, FLOATS, cast_frozen_matrices, choose_device, choose_dtype, dtype_name
from training.evaluation import ModelRunner, compute_logits
from training.in_memory import check_texts
from training.trained_folder import read_trained, run_results

CHUNK, CHARACTERS = 1024, 1 << 24  # texts, and characters, in memory at a time
AGREEMENT = 0.99  # of the labels, between int8 and float32, or int8 is not chosen
PATIENCE = 0.05  # seconds to wait for the next text, before those that have come are labelled


@dataclass(frozen=True, eq=False, repr=False)
class Classifier:
    """What `fit` and `load` of train.py return. Several threads may share one."""

    runner: ModelRunner
    tokenizer: Tokenizer
    label_names: list[str]
    max_length: int
    multi_label: bool = False  # scores by the sigmoid, each class for itself, instead of the softmax
    arithmetic: str = "float32"  # and why it was chosen
    classes_: np.ndarray = field(default_factory=lambda: np.array([]))  # (C,) the labels as `fit` got them: names or numbers
    folder: Path = Path()  # the adapter, or the whole model, that was loaded
    test_scores: dict[str, Any] = field(default_factory=dict)  # "macro_f1", "accuracy" ..., if the folder is a run's

    def __repr__(self) -> str:
        tested = f", macro-F1 {self.test_scores['macro_f1']:.4f} on the test texts" if self.test_scores else ""
        return f"<Classifier of {len(self.label_names)} classes in {self.folder}{tested}>"

    def predict(self, texts: Iterable[str]) -> np.ndarray:
        """(N,) the most likely class of each text, of the kind that `fit` got. Raises UserError for what is not a string."""
        return self.classes_[self.predict_proba(texts).argmax(axis=1)]

    def predict_proba(self, texts: Iterable[str]) -> np.ndarray:
        """(N, C) float32: the score of each class, in the order of `classes_`. An empty text gets scores like any other."""
        scores = [self.scores(chunk)[0] for chunk in slices(check_texts(texts), CHUNK, CHARACTERS)]
        return np.concatenate([np.empty((0, len(self.label_names)), dtype=np.float32), *scores])

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load`, predict.py and peft read: the files of `self.folder`.

        Raises UserError if other files are there.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}, from which this classifier was loaded, is gone. Put it back, or train it again")
        with new_folder(folder) as new, writing(folder):
            for path in self.folder.iterdir():
                if path.is_file():
                    shutil.copy(path, new)

    def label(self, texts: Iterable[str], threshold: float = 0.0) -> Iterator[dict[str, Any]]:
        """{"text", "label", "score", "scores"} for each text, in order. Takes CHUNK texts at a time, fewer if they are long.

        A text in which the tokenizer finds nothing, and one with a score below `threshold`, has the label "" and a "reason".
        """
        for chunk in slices(texts, CHUNK, CHARACTERS):
            scores, lengths = self.scores(chunk)
            for text, length, row in zip(chunk, lengths, scores.astype(float), strict=True):
                if length == 2:  # [CLS] and [SEP]
                    yield {"text": text, "label": "", "score": None, "scores": {}, "reason": "the text is empty"}
                    continue
                predicted = int(row.argmax())
                by_name = dict(zip(self.label_names, row, strict=True))
                answer = {"text": text, "label": self.label_names[predicted], "score": row[predicted], "scores": by_name}
                if row[predicted] < threshold:
                    answer |= {"label": "", "reason": f"the score is below {threshold:g}"}
                yield answer

    def scores(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(N, C) float32 scores and the (N,) numbers of tokens, of at least one text."""
        tokenized = tokenize(self.tokenizer, texts, self.max_length)
        batches = evaluation_batches(tokenized.lengths, self.runner.tokens)
        logits = np.empty((len(texts), len(self.label_names)), dtype=np.float32)
        logits[np.concatenate(batches)] = compute_logits(self.runner, tokenized, batches)  # back in the order of the texts
        return probabilities(logits, self.multi_label), tokenized.lengths


def in_parts(rows: Iterable[Row], wait: bool = True) -> Iterator[list[Row]]:
    """The rows in lists of at most CHUNK, fewer if their texts have CHARACTERS together.

    Without `wait` a list also ends when no further row comes within PATIENCE seconds.
    """
    part: list[Row] = []
    characters = 0
    for row in rows if wait else as_they_come(rows):
        if row is not None:
            part.append(row)
            characters += len(row.text)
        if part and (row is None or len(part) == CHUNK or characters >= CHARACTERS):
            yield part
            part, characters = [], 0
    if part:
        yield part


def as_they_come(rows: Iterable[Row]) -> Iterator[Row | None]:
    """Each row, and None when no further one has come within PATIENCE seconds. A thread reads a little ahead."""
    arrived: queue.Queue[Row | Exception] = queue.Queue(16)

    def read(rows: Iterator[Row]) -> None:
        try:
            while True:
                arrived.put(next(rows))
        except Exception as error:  # StopIteration at the end
            arrived.put(error)

    threading.Thread(target=read, args=[iter(rows)], daemon=True).start()  # it may be waiting for input when the program ends
    while True:
        try:
            row = arrived.get(timeout=PATIENCE)
        except queue.Empty:
            yield None
            row = arrived.get()
        if isinstance(row, StopIteration):
            return
        if isinstance(row, Exception):
            raise row
        yield row


def probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """(N, C): the softmax over the classes, or the sigmoid of each logit."""
    if multi_label:
        return 0.5 + 0.5 * np.tanh(0.5 * logits)  # 1 / (1 + exp(-x)), without overflow
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def load_classifier(
    folder: str | Path,
    model: str | None = None,
    device: str = "auto",
    max_length: int | None = None,
    dtype: str = "auto",
    sample: Sequence[str] = (),
) -> Classifier:
    """Load a run folder, an adapter folder (ours or peft's) or a whole model, as `--method full` writes it.

    The adapter is merged into the base model that it names, or into `model`. Texts are cut to `max_length` tokens [what the
    folder's tokenizer files say, otherwise as many as the model reads]. With a `sample` of texts, dtype "auto" can be int8: if
    it is the fastest here and the sample gets the labels of float32, but for 1 %. Raises UserError if the folder holds neither
    adapter nor model, an adapter of another base model, or a model that does not classify.
    """
    trained = read_trained(Path(folder), model)
    longest = trained.model.config.max_position_embeddings
    if max_length is None:
        max_length = trained.max_length
    if not 3 <= max_length <= longest:
        raise UserError(f"--max-length is {max_length}. For this model it must be between 3 and {longest}")
    runner = ModelRunner(trained.model.requires_grad_(False), choose_device(device), torch.float32)
    exact = Classifier(
        runner,
        trained.tokenizer,
        [str(label) for label in trained.classes],
        max_length,
        trained.multi_label,
        classes_=np.array(trained.classes),
        folder=trained.folder,
        test_scores=run_results(trained.folder).get("after", {}),
    )
    return in_dtype(exact, dtype, sample)


def in_dtype(exact: Classifier, name: str, sample: Sequence[str]) -> Classifier:
    """A classifier in float32, changed to the arithmetic with that name (see `load_classifier`)."""
    model, device = exact.runner.model, exact.runner.device
    dtype, reason = choose_dtype(name, device, DTYPES if sample else FLOATS)
    if dtype == torch.int8 and sample:
        rounded = replace(exact, runner=ModelRunner(model, device, dtype))
        pairs = list(zip(exact.label(sample), rounded.label(sample), strict=True))
        same = sum(one["label"] == other["label"] for one, other in pairs)
        changes = (abs(one["scores"][key] - other["scores"][key]) for one, other in pairs for key in one["scores"])
        agreement = f"{same} of {len(sample)} labels as in float32, and a score moves by {max(changes, default=0):.3f} at most"
        if name != "auto" or same >= AGREEMENT * len(sample):
            return replace(rounded, arithmetic=f"int8 ({reason}; {agreement})")
        dtype, reason = choose_dtype("auto", device)
        reason += f"; not int8: {agreement}"
    cast_frozen_matrices(model.to(device), dtype)
    return replace(exact, runner=ModelRunner(model, device, dtype), arithmetic=f"{dtype_name(dtype)} ({reason})")
