"""Tokenise once, group texts of similar length, pad little."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.errors import UserError
from data.long_texts import encode

# Per call of the tokenizer, which works on the texts in parallel: 100 MB of memory at most.
SLICE, SLICE_CHARACTERS = 1000, 1 << 20
POOL = 50  # shuffled examples are sorted by length in pools of 50 batches; a larger pool pads less but mixes less


@dataclass(frozen=True)
class TokenizedTexts:
    """The token ids of N texts in one array: text i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray  # (sum of lengths,) int32
    offsets: np.ndarray  # (N + 1,) int64
    cut: int = 0  # how many texts were longer

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> TokenizedTexts:
    """The ids of [CLS] text [SEP], cut to `max_length` tokens, [CLS] and [SEP] included. Changes nothing in `tokenizer`.

    Raises UserError if the tokenizer cannot read a text.
    """
    rows: list[np.ndarray] = []
    cut = 0
    try:
        for part in slices(texts, SLICE, SLICE_CHARACTERS):
            for ids in encode(tokenizer, part, max_length - 2):
                cut += len(ids) > max_length
                kept = ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]  # the last is [SEP]
                rows.append(np.array(kept, dtype=np.int32))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a bug in the tokenizer's Rust code, which is not even an Exception
            raise
        raise UserError(f"the tokenizer fails ({error}). Fetch tokenizer.json again, or report this to tokenizers") from None
    return TokenizedTexts(np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64), cut)


def slices(texts: Iterable[str], count: int, characters: int) -> Iterator[list[str]]:
    """All texts in lists of at most `count`, each of which ends with the text that makes it `characters` long or longer."""
    part, length = [], 0
    for text in texts:
        part.append(text)
        length += len(text)
        if len(part) == count or length >= characters:
            yield part
            part, length = [], 0
    if part:
        yield part


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, as arrays of example indices. Each example occurs once, beside others of similar length.

    A pure function of its arguments, so that a run can be repeated, or resumed in the middle of an epoch.
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
    """Split `batch` into micro-batches of equal size and at most `tokens` tokens each, padding included.

    This bounds memory. Texts of similar length are put together, so few are padded to the length of the longest one. A text
    of more than `tokens` tokens is a micro-batch by itself. An empty batch has no micro-batches.
    """
    if not len(batch):
        return []
    order = batch[np.argsort(lengths[batch], kind="stable")]
    size = max(1, tokens // int(lengths[order[-1]]))
    return np.array_split(order, math.ceil(len(order) / size))


def evaluation_batches(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Every example once, sorted by length, in micro-batches of at most `tokens` tokens, padding included."""
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for end in range(1, len(order) + 1):  # lengths are ascending, so the next text is the longest
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > tokens:
            batches.append(order[start:end])
            start = end
    return batches


def pad(texts: TokenizedTexts, batch: np.ndarray) -> tuple[Tensor, Tensor]:
    """input_ids (B, T) int64, padded to the longest text of the batch, and attention_mask (B, T) bool.

    Padding has id 0, which is [PAD] in BERT models. Any id would do, since the mask hides it.
    """
    lengths = texts.offsets[batch + 1] - texts.offsets[batch]
    mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T), true at tokens
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    input_ids[mask] = np.concatenate([texts.ids[texts.offsets[i] : texts.offsets[i + 1]] for i in batch])
    return torch.from_numpy(input_ids), torch.from_numpy(mask)
