"""Cut a long text before it is tokenised, without changing the tokens that are read.

A tokenizer takes about 100 bytes of memory for each character, and the network reads a few hundred tokens. Where to cut is
known exactly for the tokenizers of the BERT family: they normalise character by character, split the text into words at
spaces and punctuation, and look up each word by itself. So a cut can change only the words near it.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator

import numpy as np
from tokenizers import Encoding, Tokenizer

from common.errors import UserError

CHARACTERS = 8  # for each token; in English a token and its share of the spaces take about 5
FEWEST = 1024  # characters that are always read
WINDOW = 1 << 18  # the most characters that are read at a time
LONG = 256  # characters; words and spaces longer than this are made shorter if a window has few tokens


class Cutter:
    """Cuts texts to a beginning that has the same first `tokens` tokens, [CLS] and [SEP] not counted."""

    def __init__(self, tokenizer: Tokenizer, tokens: int):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.words_at_risk = words_at_risk(tokenizer)
        self.characters = max(FEWEST, CHARACTERS * tokens)

    def token_ids(self, texts: list[str]) -> Iterator[np.ndarray]:
        """For each text the ids of [CLS], at least `tokens` tokens if it has as many, and [SEP].

        Raises UserError if the tokenizer fails.
        """
        known = self.words_at_risk is not None
        with rust_panics():
            encodings = self.tokenizer.encode_batch_fast([text[: self.characters] for text in texts] if known else texts)
            for text, encoding in zip(texts, encodings, strict=True):
                ids = np.asarray(encoding.ids, dtype=np.int32)
                if known and len(text) > self.characters and not self.is_enough(ids):
                    ids = np.asarray(self.tokenizer.encode(self.cut(text)).ids, dtype=np.int32)
                yield ids

    def is_enough(self, ids: np.ndarray) -> bool:
        """Whether so many words follow the wanted tokens that no cut behind `ids` can change these."""
        return int(self.begins_word[ids[1 + self.tokens : -1]].sum()) > (self.words_at_risk or 0)

    @functools.cached_property
    def begins_word(self) -> np.ndarray:
        """(vocabulary,) bool: false for the tokens that continue a word."""
        vocabulary = self.tokenizer.get_vocab()
        begins = np.ones(1 + max(vocabulary.values()), dtype=bool)
        begins[[id for token, id in vocabulary.items() if token.startswith("##")]] = False
        return begins

    def cut(self, text: str) -> str:
        """A beginning that is enough for certain. Words that are too long for the vocabulary may be other ones there.

        Takes little memory also for millions of characters that have few tokens.
        """
        head, start, size = "", 0, self.characters
        at_risk = self.words_at_risk
        while at_risk is not None and start + size < len(text):
            window = head + text[start : start + size]
            encoding = self.tokenizer.encode(window, add_special_tokens=False)
            words = np.array(encoding.word_ids)  # ascending
            if len(words) > self.tokens and words[self.tokens - 1] + at_risk < words[-1]:
                return window
            if size < WINDOW:
                size = min(4 * size, WINDOW)
            else:
                head, start = squeeze(self.tokenizer, window, encoding), start + size
        return head + text[start:]


@contextlib.contextmanager
def rust_panics() -> Iterator[None]:
    """A bug in the tokenizer's Rust code is raised as PanicException, which is not even an Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer fails ({error}). Fetch tokenizer.json again, or report this to tokenizers") from None


def words_at_risk(tokenizer: Tokenizer) -> int | None:
    """How many words before a cut it can change. None if that is not known, so that texts must not be cut.

    It can cut a word in two, and an added token such as [MASK], which is up to six words then: "[", "ma", ...
    """
    kind = [type(part).__name__ for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model)]
    if kind != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] or tokenizer.model.continuing_subword_prefix != "##":
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    for token in added:
        if token.single_word or token.content[:1].isalnum() or len(token.content.split()) != 1:
            return None  # it may begin within a word, or contain a space
    words = 3 * max((len(token.content) for token in added), default=1)
    return words if words < LONG else None


def squeeze(tokenizer: Tokenizer, text: str, encoding: Encoding) -> str:
    """`text` with other words in place of very long ones, which have the token [UNK] as well, and with shorter spaces."""
    longest = tokenizer.model.max_input_chars_per_word
    pieces, end = [], 0
    for _, tokens in itertools.groupby(zip(encoding.word_ids, encoding.offsets, strict=True), key=lambda token: token[0]):
        offsets = [offset for _, offset in tokens]
        start, stop = offsets[0][0], offsets[-1][1]
        pieces += [short_space(tokenizer, text[end:start]), short_word(tokenizer, text[start:stop], longest)]
        end = stop
    return "".join([*pieces, short_space(tokenizer, text[end:])])


def short_space(tokenizer: Tokenizer, space: str) -> str:
    """What lies between two words: spaces, and characters that the tokenizer drops."""
    if len(space) <= LONG:
        return space
    kept = tokenizer.normalizer.normalize_str("".join(set(space)))
    return " "[: len(kept)] if not kept.strip(" ") else space


def short_word(tokenizer: Tokenizer, word: str, longest: int) -> str:
    """`longest`: words of more characters, after those that are dropped, have the token [UNK]."""
    if len(word) <= LONG:
        return word
    beginning = tokenizer.normalizer.normalize_str(word[: 4 * longest])
    return "x" * (longest + 1) if len(beginning) > longest else tokenizer.normalizer.normalize_str(word)
