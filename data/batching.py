"""Tokenise once, group by length, pad little."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

SLICE = 1000  # texts handed to the tokenizer at a time: it works in parallel within a slice, and memory is bounded by one
POOL = 50  # batches' worth of shuffled examples that are sorted by length together; more pads less and mixes less


@dataclass(frozen=True)
class TokenizedTexts:
    """All token ids of N texts, one after the other: text i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray  # (sum of lengths,) int32
    offsets: np.ndarray  # (N + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> TokenizedTexts:
    """[CLS] text [SEP] as ids, cut to `max_length` tokens, the special ones included."""
    tokenizer.enable_truncation(max_length)
    slices, lengths = [], [0]
    for start in range(0, len(texts), SLICE):
        encodings = tokenizer.encode_batch_fast(texts[start : start + SLICE])
        slices.append(np.concatenate([np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]))
        lengths.extend(len(encoding) for encoding in encodings)
    tokenizer.no_truncation()  # as it was, so that a saved tokenizer does not cut
    return TokenizedTexts(np.concatenate(slices), np.cumsum(lengths, dtype=np.int64))


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch as arrays of example numbers: similar lengths together, every example once, random order.

    A pure function of its arguments, so that a run can be repeated or taken up again in the middle.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), POOL * batch_size):
        pool = shuffled[start : start + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(lengths: np.ndarray, batch: np.ndarray, tokens: int) -> list[np.ndarray]:
    """The examples of `batch` in the fewest equal parts that have at most `tokens` tokens each, padding included.

    Parts hold texts of similar length. Memory is bounded by `tokens` whatever the longest text of a batch, and the longest
    text pads its own part only. A text of more than `tokens` is a part by itself. An empty batch has no parts.
    """
    if not len(batch):
        return []
    order = batch[np.argsort(lengths[batch], kind="stable")]
    size = max(1, tokens // int(lengths[order[-1]]))
    return np.array_split(order, math.ceil(len(order) / size))


def evaluation_batches(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Every example once, sorted by length, in batches of at most `tokens` tokens, padding included."""
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for end in range(1, len(order) + 1):  # lengths only grow, so that the next text is the longest
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > tokens:
            batches.append(order[start:end])
            start = end
    return batches


def pad(texts: TokenizedTexts, batch: np.ndarray) -> tuple[Tensor, Tensor]:
    """input_ids (B, T) int64, padded to the longest text of the batch, and attention_mask (B, T) bool.

    Padding is id 0, [PAD] in the BERT family; any would do, since the mask hides it.
    """
    lengths = texts.offsets[batch + 1] - texts.offsets[batch]
    mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T), true where there is a token
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    input_ids[mask] = np.concatenate([texts.ids[texts.offsets[i] : texts.offsets[i + 1]] for i in batch])
    return torch.from_numpy(input_ids), torch.from_numpy(mask)
