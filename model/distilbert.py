"""DistilBERT for sequence classification, written by hand. Modules have the names of the hub's checkpoint.

DistilBERT (Sanh et al. 2019, arXiv:1910.01108) is BERT (Devlin et al. 2018, arXiv:1810.04805) with half the layers and
without token types and pooler. Shapes: B texts, T tokens, D = config.dim (768), H = config.n_heads (12), D/H = 64.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DistilBertConfig:
    """The fields of `config.json` that define the network; the defaults are those of distilbert-base-uncased."""

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    dim: int = 768
    n_layers: int = 6
    n_heads: int = 12
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int = 0
    num_labels: int = 2


class Embeddings(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.position_embeddings(position)  # (B, T, D) + (T, D)
        return self.dropout(self.LayerNorm(x))  # (B, T, D)


class MultiHeadSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D/H)) v in each of the H heads (Vaswani et al. 2017, section 3.2).

    Queries come from x (B, S, D), keys and values from context (B, T, D). The two are the same, except in the last layer,
    where x is [CLS] alone and S = 1. The mask (B, 1, 1, T) is true at tokens and false at padding.
    """

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.attention_dropout
        self.q_lin = nn.Linear(config.dim, config.dim)
        self.k_lin = nn.Linear(config.dim, config.dim)
        self.v_lin = nn.Linear(config.dim, config.dim)
        self.out_lin = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, 768) -> (B, T, 12, 64) -> (B, 12, T, 64)

        q, k, v = heads(self.q_lin(x)), heads(self.k_lin(context)), heads(self.v_lin(context))  # q has S in place of T
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_lin(y.transpose(1, 2).flatten(2))  # (B, 12, S, 64) -> (B, S, 12, 64) -> (B, S, 768)


class FFN(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.lin1 = nn.Linear(config.dim, config.hidden_dim)
        self.lin2 = nn.Linear(config.hidden_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.lin2(F.gelu(self.lin1(x))))  # the exact GELU, with erf


class TransformerBlock(nn.Module):
    """One layer's output (B, S, D) at the positions of `x` (B, S, D), which attend to all of `context` (B, T, D)."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.attention = MultiHeadSelfAttention(config)
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.ffn = FFN(config)
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.sa_layer_norm(x + self.attention(x, context, mask))
        return self.output_layer_norm(x + self.ffn(x))


class Transformer(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.layer = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, D), the last layer's output at [CLS], position 0.

        A classifier reads nothing else of the last layer, so nothing else is computed: keys and values come from all
        positions, but query, output and feed-forward from [CLS] alone.
        """
        for block in self.layer[:-1]:
            x = block(x, x, mask)
        cls = x[:, :1].contiguous()  # (B, 1, D); contiguous: one product for the batch, not one per text
        return self.layer[-1](cls, x, mask)[:, 0]


class DistilBert(nn.Module):
    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.transformer = Transformer(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, D), the output at [CLS], position 0."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        return self.transformer(self.embeddings(input_ids), mask)


class DistilBertForSequenceClassification(nn.Module):
    """The encoder, and a head of two layers on its output at [CLS]."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        self.config = config
        self.distilbert = DistilBert(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = nn.Dropout(config.seq_classif_dropout)
        self.apply(init_weights)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_labels) for token ids (B, T) int64; `attention_mask` (B, T) is 0 at padding.

        Raises IndexError for an id outside the vocabulary or a text longer than `config.max_position_embeddings`.
        """
        cls = self.distilbert(input_ids, attention_mask)  # (B, D)
        return self.classifier(self.dropout(F.relu(self.pre_classifier(cls))))


def init_weights(module: nn.Module) -> None:
    """Initialise a layer as transformers does: weights from N(0, 0.02^2) (`initializer_range`), biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
