"""The network: a handwritten DistilBERT, and its weights from and to the hub's format."""

from model.distilbert import DistilBertConfig, DistilBertForSequenceClassification
from model.pretrained import EMBEDDED, EMBEDDED_ON_HUB, load_pretrained, resolve_revision, save_pretrained, weights_sha256

__all__ = [
    "EMBEDDED",
    "EMBEDDED_ON_HUB",
    "DistilBertConfig",
    "DistilBertForSequenceClassification",
    "load_pretrained",
    "resolve_revision",
    "save_pretrained",
    "weights_sha256",
]
