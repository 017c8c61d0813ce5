"""What a run works on: model and data by name, or, where nothing was named and there is no hub, what is embedded."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from common.errors import UserError
from common.hub import HubUnreachable
from data import TokenizedTexts, load_dataset, tokenize
from model import DistilBertForSequenceClassification, load_pretrained, resolve_revision, weights_sha256
from training.checkpoint import Checkpoint
from training.options import DEFAULT_DATASET, DEFAULT_MODEL, EMBEDDED_DATASET, EMBEDDED_MODEL, Options


@dataclass(frozen=True)
class Inputs:
    base: DistilBertForSequenceClassification  # with a new head
    tokenizer: Tokenizer
    train_texts: TokenizedTexts
    train_labels: np.ndarray  # (N,) int64
    test_texts: TokenizedTexts
    test_labels: np.ndarray
    label_names: list[str]
    model: str  # the names of what was loaded, whoever chose it
    dataset: str
    commit: str | None  # of the hub
    revision: str | None
    sha256: dict[str, str]  # of "weights" and "data"
    notice: str  # if what is embedded stepped in

    def found(self) -> dict[str, Any]:
        """What a checkpoint says of them, so that the same are loaded again."""
        return {"model": self.model, "commit": self.commit, "dataset": self.dataset, "notice": self.notice}

    def load_base(self) -> DistilBertForSequenceClassification:
        """The base model once more, with another new head."""
        return load_pretrained(self.model, len(self.label_names), self.revision)[0]


def load_inputs(options: Options, saved: Checkpoint | None) -> Inputs:
    """What the options ask for, or what the run of a checkpoint began with. Raises UserError if it does not fit together."""
    asked_data, asked_model = (saved.dataset, saved.model) if saved else (options.dataset, options.model)
    dataset, dataset_name, data_notice = load_with_fallback(load_dataset, asked_data, DEFAULT_DATASET, EMBEDDED_DATASET)
    if asked_model is None and options.revision is not None:
        asked_model = DEFAULT_MODEL

    def load_at_commit(name: str) -> tuple[DistilBertForSequenceClassification, Tokenizer, str | None]:
        commit = (saved and saved.commit) or resolve_revision(name, options.revision)  # for a branch may move while we train
        return *load_pretrained(name, len(dataset.label_names), commit or options.revision), commit

    torch.manual_seed(options.seed)  # the head starts at random
    loaded, model_name, model_notice = load_with_fallback(load_at_commit, asked_model, DEFAULT_MODEL, EMBEDDED_MODEL)
    base, tokenizer, commit = loaded
    notice = saved.notice if saved else "\n".join(filter(None, [model_notice, data_notice]))
    if notice:
        print(notice)
    if options.max_length > base.config.max_position_embeddings:
        raise UserError(
            f"--max-length is {options.max_length}, and {model_name} reads {base.config.max_position_embeddings} tokens"
        )
    if options.r > base.config.dim:
        raise UserError(f"--r is {options.r}, and no layer of {model_name} has a rank above {base.config.dim}")

    train_split, test_split = dataset.train.first(options.train_limit), dataset.test.first(options.test_limit)
    train_texts = tokenize(tokenizer, train_split.texts, options.max_length)
    test_texts = tokenize(tokenizer, test_split.texts, options.max_length)
    print(f"model {model_name}, data {dataset_name}: {len(train_split):,} examples to train on, {len(test_split):,} to test on")
    revision = commit or options.revision
    return Inputs(
        base=base,
        tokenizer=tokenizer,
        train_texts=train_texts,
        train_labels=train_split.labels,
        test_texts=test_texts,
        test_labels=test_split.labels,
        label_names=dataset.label_names,
        model=model_name,
        dataset=dataset_name,
        commit=commit,
        revision=revision,
        sha256={
            "weights": weights_sha256(model_name, revision),
            "data": data_sha256(train_texts, train_split.labels, test_texts, test_split.labels),
        },
        notice=notice,
    )


def data_sha256(train: TokenizedTexts, train_labels: np.ndarray, test: TokenizedTexts, test_labels: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in (train.ids, train_labels, test.ids, test_labels):
        digest.update(array.data)
    return digest.hexdigest()


def load_with_fallback(load: Callable[[str], Any], asked: str | None, default: str, embedded: str) -> tuple[Any, str, str]:
    """(what was loaded, its name, a notice if the embedded one stepped in). A name that was typed is obeyed or refused."""
    try:
        name = default if asked is None else asked
        return load(name), name, ""
    except HubUnreachable:
        if asked is not None:
            raise
    notice = f"{default} is not on this machine and the hub cannot be reached: the embedded {embedded} steps in"
    return load(embedded), embedded, notice
