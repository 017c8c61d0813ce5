"""The network: a handwritten DistilBERT, loaded from and saved in the hub's format."""
# ruff: noqa: F401 - imported for the other folders

from model.distilbert import DistilBertConfig, DistilBertForSequenceClassification
from model.pretrained import (
    EMBEDDED,
    EMBEDDED_ON_HUB,
    config_sha256,
    load_config,
    load_pretrained,
    outline,
    read_model_config,
    resolve_revision,
    save_pretrained,
    weights_sha256,
    write_model,
)
from model.tokenizer import read_max_length, read_tokenizer, write_tokenizer
