"""What a run works on: the model, the data and the adapter's configuration, loaded and checked against each other."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer

from common.errors import HubUnreachable, UserError, did_you_mean
from data import Dataset, load_dataset, tokenize
from lora import LoraConfig
from lora.targets import find_head, find_targets
from model import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    config_sha256,
    load_config,
    load_pretrained,
    outline,
    resolve_revision,
    weights_sha256,
)
from training.checkpoint import Checkpoint
from training.data_summary import describe_data
from training.evaluation import Examples
from training.options import DEFAULT_DATASET, DEFAULT_MODEL, EMBEDDED_DATASET, EMBEDDED_MODEL, Options
from training.starting_adapter import StartingAdapter, read_starting_adapter

SHOWN = 320  # characters of a test text, to recognise it by in predictions.jsonl
MOST_CLASSES = 1000  # the confusion matrix is written in full; more are nearly always numbers of rows, or the texts themselves


@dataclass(frozen=True)
class Inputs:
    base: DistilBertForSequenceClassification  # with a new head
    tokenizer: Tokenizer
    train: Examples
    test: Examples
    validation: Examples | None
    test_texts: list[str]  # how each text of the test part begins
    label_names: list[str]
    lora_config: LoraConfig | None  # None with --method full
    adapter: StartingAdapter | None  # with --adapter
    model: str  # the name of the model and of the data set, typed or chosen
    dataset: str
    commit: str | None  # of the model, if it comes from the hub
    dataset_commit: str | None  # likewise
    revision: str | None
    sha256: dict[str, str]  # of the "weights", the "config", the "data" and the "adapter" it starts from
    notice: str  # not empty if the embedded model or data is used instead

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint records, so that a resumed run loads the same."""
        return {name: getattr(self, name) for name in ("model", "commit", "dataset", "dataset_commit", "notice")}

    def load_base(self) -> DistilBertForSequenceClassification:
        """The base model once more, with another new head."""
        base = load_pretrained(self.model, len(self.label_names), self.revision)[0]
        require_weights(self.model, self.revision, self.sha256)
        return base


def require_weights(model: str, revision: str | None, sha256: dict[str, str]) -> None:
    """Raises UserError if the file with the model's weights is no longer that of the run."""
    if weights_sha256(model, revision) != sha256["weights"]:
        changed = f"the weights of the base model {model} have changed since the run began: their sha256 differs"
        raise UserError(f"{changed}. Put the old file back. A run that has not ended can be resumed then")


def load_inputs(options: Options, checkpoint: Checkpoint | None) -> Inputs:
    """Load the model and data of the options, or of the checkpoint. Raises UserError if they do not fit together."""
    dataset_name, model_name = (checkpoint.dataset, checkpoint.model) if checkpoint else (options.dataset, options.model)
    if model_name is None and options.revision is not None:
        model_name = DEFAULT_MODEL  # without a fallback: the embedded model has no revisions
    if dataset_name is None and options.dataset_revision is not None:
        dataset_name = DEFAULT_DATASET  # likewise

    if checkpoint is None:
        # before the long work; once more below, because the hub may stop answering in between
        config, name, _ = load_with_fallback(
            lambda name: load_config(name, options.revision), model_name, DEFAULT_MODEL, EMBEDDED_MODEL
        )
        require_fit(options, name, config)

    dataset_revision = (checkpoint and checkpoint.dataset_commit) or options.dataset_revision
    dataset, dataset_name, data_notice = load_with_fallback(
        lambda name: load_data(name, options, dataset_revision), dataset_name, DEFAULT_DATASET, EMBEDDED_DATASET
    )
    if (number := len(dataset.label_names)) > MOST_CLASSES:
        classes = f"{number:,} classes, {dataset.label_names[0][:40]!r} and others"
        raise UserError(f"{dataset_name} has {classes}. At most {MOST_CLASSES:,} are trained: is another column the label?")

    def load_at_commit(name: str) -> tuple[DistilBertForSequenceClassification, Tokenizer, str | None, str]:
        # a branch may move during training, so the run keeps to one commit
        commit = (checkpoint and checkpoint.commit) or resolve_revision(name, options.revision)
        sha256 = weights_sha256(name, commit or options.revision)  # before: if the file changes now, `load_base` will see it
        return *load_pretrained(name, len(dataset.label_names), commit or options.revision), commit, sha256

    torch.manual_seed(options.seed)  # the head starts at random
    loaded, model_name, model_notice = load_with_fallback(load_at_commit, model_name, DEFAULT_MODEL, EMBEDDED_MODEL)
    base, tokenizer, commit, sha256 = loaded
    notice = checkpoint.notice if checkpoint else "\n".join(filter(None, [model_notice, data_notice]))
    if notice:
        print(notice)
    require_fit(options, model_name, base.config)

    train, test, validation = tokenize_examples(dataset, tokenizer, options.max_length)
    sizes = f"{len(dataset.train):,} training examples, {len(dataset.test):,} test examples"
    about = describe_data(dataset, train, test, options.max_length)
    print(f"model {model_name}, data {dataset_name}: {sizes}", *about, *dataset.notes, sep="\n")
    revision = commit or options.revision
    lora_config = options.lora_config(model_name, revision)
    digests = {"weights": sha256, "config": config_sha256(base.config), "data": data_sha256(train, test, validation)}
    adapter = None
    if options.adapter is not None:
        adapter = read_starting_adapter(options, dataset.label_names, sha256)
        lora_config = replace(adapter.config, base_model_name_or_path=model_name, revision=revision)
        digests["adapter"] = adapter.sha256
    return Inputs(
        base=base,
        tokenizer=tokenizer,
        train=train,
        test=test,
        validation=validation,
        test_texts=[text[:SHOWN] for text in dataset.test.texts],
        label_names=dataset.label_names,
        lora_config=lora_config,
        adapter=adapter,
        model=model_name,
        dataset=dataset_name,
        commit=commit,
        dataset_commit=dataset.commit,
        revision=revision,
        sha256=digests,
        notice=notice,
    )


def require_fit(options: Options, model: str, config: DistilBertConfig) -> None:
    """Raises UserError if the options ask for what the model does not have: so many tokens, such a rank, such layers."""
    if options.max_length > (longest := config.max_position_embeddings):
        raise UserError(f"--max-length is {options.max_length}, but {model} reads at most {longest} tokens")
    if options.r > config.dim:
        raise UserError(f"--r is {options.r}, but the weights of {model} have rank {config.dim} at most")
    if lora_config := options.lora_config(model, options.revision):
        network = outline(config)
        try:
            find_targets(network, lora_config, find_head(network, lora_config))
        except UserError as error:
            parts = [name.split(".") for name, _ in network.named_modules()]
            known = {".".join(words[start:]) for words in parts for start in range(len(words))} | {"all-linear"}
            unknown = [name for name in options.target_modules if name not in known]
            raise UserError(f"{error}{did_you_mean(unknown[0], known) if unknown else ''}") from error


def load_data(name: str, options: Options, revision: str | None) -> Dataset:
    """The data of a run, within its limits, and with its validation part."""
    dataset = load_dataset(name, options.text_column, options.label_column, options.test_share, options.seed, revision)
    limited = dataset.limited(options.train_limit, options.test_limit, options.seed)
    return limited.with_validation(options.validation_share, options.seed)


def tokenize_examples(dataset: Dataset, tokenizer: Tokenizer, max_length: int) -> tuple[Examples, Examples, Examples | None]:
    """The training, the test and, if there is one, the validation part."""
    parts = (dataset.train, dataset.test, dataset.validation)
    train, test, *validation = (Examples(tokenize(tokenizer, part.texts, max_length), part.labels) for part in parts if part)
    return train, test, validation[0] if validation else None


def data_sha256(*parts: Examples | None) -> str:
    digest = hashlib.sha256()
    for texts, labels in filter(None, parts):
        digest.update(texts.ids.data)
        digest.update(labels.data)
    return digest.hexdigest()


def load_with_fallback(load: Callable[[str], Any], name: str | None, default: str, embedded: str) -> tuple[Any, str, str]:
    """Returns what was loaded, its name, and a notice if it is the embedded replacement.

    A name that was typed is loaded or rejected. Only the default falls back, and only if the hub cannot be reached.
    """
    if name is not None:
        return load(name), name, ""
    try:
        return load(default), default, ""
    except HubUnreachable:
        notice = f"{default}: not on this machine, and the hub cannot be reached. Using the embedded {embedded} instead"
    return load(embedded), embedded, notice
