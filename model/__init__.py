"""The network: a handwritten DistilBERT, and its weights from and to the hub's format."""

from model.distilbert import DistilBertConfig, DistilBertForSequenceClassification
from model.pretrained import load_pretrained, save_pretrained

__all__ = ["DistilBertConfig", "DistilBertForSequenceClassification", "load_pretrained", "save_pretrained"]
