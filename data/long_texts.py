"""Tokenise the beginning of a long text, without changing the tokens that are read.

A tokenizer takes about 100 bytes of memory for each character, and the network reads a few hundred tokens. The tokenizers of
the BERT family normalise character by character, split the text into words at spaces and punctuation, and look up each word by
itself. So a cut can change only the words near it.
"""

from collections.abc import Iterator, Sequence

from tokenizers import Encoding, Tokenizer

CHARACTERS = 8  # for each token; in English a token and its share of the spaces take about 5
FEWEST = 1024  # characters that are always read
WINDOW = 1 << 18  # the most characters that are read at a time
LONG = 256  # characters; longer words and gaps are made shorter if a window has few tokens


def encode(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> Iterator[list[int]]:
    """For each text the ids of [CLS], at least `tokens` tokens if it has as many, and [SEP]."""
    at_risk = words_at_risk(tokenizer)
    size = max(FEWEST, CHARACTERS * tokens, 0 if at_risk is not None else max(map(len, texts)))
    short = iter(tokenizer.encode_batch_fast([text for text in texts if len(text) <= size]))
    long = iter(tokenizer.encode_batch([text[:size] for text in texts if len(text) > size]))
    for text in texts:
        encoding = next(short) if len(text) <= size else next(long)
        head, start, end = "", 0, size  # `encoding` is that of head + text[start:end]
        while end < len(text) and not is_enough(encoding, tokens, at_risk or 0):
            if end - start >= WINDOW:
                head, start = squeeze(tokenizer, head + text[start:end], encoding), end
            end = start + min(4 * (end - start) or WINDOW, WINDOW)
            encoding = tokenizer.encode(head + text[start:end])
        yield encoding.ids


def words_at_risk(tokenizer: Tokenizer) -> int | None:
    """How many words before a cut it can change. None if that is not known, so that texts must not be cut.

    It can cut a word in two, and an added token such as [MASK], which is up to six words then: "[", "ma", ...
    """
    kinds = [type(part).__name__ for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model)]
    added = tokenizer.get_added_tokens_decoder().values()
    words = 3 * max((len(token.content) for token in added), default=1)
    odd = any(
        (token.single_word or token.content[:1].isalnum())  # may begin within another word
        or (token.lstrip or token.rstrip or len(token.content.split()) != 1)  # contains spaces
        for token in added
    )
    return None if odd or words >= LONG or kinds != ["BertNormalizer", "BertPreTokenizer", "WordPiece"] else words


def is_enough(encoding: Encoding, tokens: int, at_risk: int) -> bool:
    """Whether so many words follow the wanted tokens that no cut behind them can change these."""
    words = [word for word in encoding.word_ids if word is not None]  # of each token; [CLS] and [SEP] have none
    return len(words) > tokens and words[tokens - 1] + at_risk < words[-1]


def squeeze(tokenizer: Tokenizer, text: str, encoding: Encoding) -> str:
    """`text` with shorter words and gaps of the same tokens in place of long ones. A gap is spaces and dropped characters."""
    longest = tokenizer.model.max_input_chars_per_word  # a word of more characters has the token [UNK]

    def short(piece: str, instead: str) -> str:
        if len(piece) <= LONG:
            return piece
        kept = tokenizer.normalizer.normalize_str(piece)
        return kept if len(kept) <= longest else instead

    pieces, end = [], 0
    words = dict.fromkeys(word for word in encoding.word_ids if word is not None)
    for start, stop in filter(None, map(encoding.word_to_chars, words)):
        pieces += [short(text[end:start], " "), short(text[start:stop], "x" * (longest + 1))]
        end = stop
    return "".join([*pieces, short(text[end:], " ")])
