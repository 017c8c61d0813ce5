"""The tokenizer of a model: tokenizer.json, and what tokenizer_config.json says of the length and changes in the words."""

import json
import os
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from common.errors import UserError
from common.files import read_bytes, read_json
from model.distilbert import DistilBertConfig

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
READS_TOKENIZER_JSON = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes of transformers that take it as it is
# The others build their own BertNormalizer from tokenizer_config.json: the name there, its default -> the name in tokenizers.
NORMALIZER = {
    ("do_lower_case", True): "lowercase",
    ("strip_accents", None): "strip_accents",
    ("tokenize_chinese_chars", True): "handle_chinese_chars",
}


def read_tokenizer(path: Path, config: DistilBertConfig) -> Tokenizer:
    """The tokenizer in a tokenizer.json, as the tokenizer_config.json beside it changes it. Raises UserError, with the file."""
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing: only 'fast' tokenizers, which are one file, are supported")
    content = read_bytes(path)
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_padding()  # data/batching.py cuts and pads
        tokenizer.no_truncation()
        unknown = tokenizer.encode("\N{SAUROPOD}")  # an unknown word, which fails unless there is a token for such
        empty = tokenizer.encode("")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The Rust library raises nothing narrower, and for a bug not even an Exception. Before that, it prints a report of its
        # own to file 2. To keep that back, the whole process would have to lose its standard error meanwhile, also in a crash.
        raise UserError(f"{path} is not a tokenizer ({error}): download it again") from error
    words = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if words > config.vocab_size:
        raise UserError(f"{path} has {words} words, but the model has {config.vocab_size}: they do not belong together")
    ends = [unknown.ids[0], unknown.ids[-1]] if len(unknown) > 2 else []
    named = [tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")]  # None where they have other names
    if empty.ids != ends or len(ends) != 2 or any(id not in (None, end) for id, end in zip(named, ends, strict=True)):
        raise UserError(f"{path} does not put a text between [CLS] and [SEP]: it is not a BERT tokenizer")
    _obey_tokenizer_config(tokenizer, path.with_name(TOKENIZER_CONFIG))
    return tokenizer


def _obey_tokenizer_config(tokenizer: Tokenizer, path: Path) -> None:
    """What tokenizer_config.json says of capitals, accents and Chinese, or leaves out, wins, as in transformers."""
    if not path.is_file():
        return
    options = read_json(path)
    if options.get("truncation_side", "right") != "right":
        raise UserError(f"{path}: truncation_side is {options['truncation_side']!r}; only 'right' is supported")
    if options.get("tokenizer_class") in READS_TOKENIZER_JSON:
        return
    normalizer = tokenizer.normalizer
    lowers = normalizer is not None and normalizer.normalize_str("A") == "a"
    for (theirs, default), ours in NORMALIZER.items():
        value = options.get(theirs, default)
        if not isinstance(value, bool) and (value is not None or theirs != "strip_accents"):
            raise UserError(f"{path}: {theirs} is {value!r}; it must be true or false")
        if isinstance(normalizer, BertNormalizer):
            setattr(normalizer, ours, value)
        elif theirs == "do_lower_case" and options.get(theirs, lowers) != lowers:
            raise UserError(f"{path}: do_lower_case is {value}, but {TOKENIZER} does otherwise: mend the one that is wrong")


def write_tokenizer(tokenizer: Tokenizer, max_length: int, folder: Path) -> None:
    """tokenizer.json, and tokenizer_config.json with `max_length`, to which transformers cuts texts, too (truncation=True)."""
    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")}
    config = {"tokenizer_class": READS_TOKENIZER_JSON[0], "model_max_length": max_length}
    config |= {"model_input_names": ["input_ids", "attention_mask"]}  # DistilBERT takes no token_type_ids
    config |= {name: token for name, token in special.items() if tokenizer.token_to_id(token) is not None}
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_max_length(folder: Path) -> int | None:
    """The maximum tokens per text in a folder's tokenizer files; None if they say none.

    The smaller of `model_max_length` in tokenizer_config.json and of the truncation in tokenizer.json, which a tokenizer of
    transformers keeps from its last use. Raises UserError if it is not a number above 2.
    """
    lengths = {}
    if (path := folder / TOKENIZER_CONFIG).is_file():
        lengths[path] = read_json(path).get("model_max_length")
    if (path := folder / TOKENIZER).is_file() and isinstance(truncation := read_json(path).get("truncation"), dict):
        lengths[path] = truncation.get("max_length")
    for path, length in lengths.items():
        if length is not None and not (type(length) in (int, float) and length > 2):
            raise UserError(f"{path}: the maximum length is {length!r}. It must be a number above 2")
    return min((int(length) for length in lengths.values() if length is not None), default=None)
