"""What is read from each form of a data set, how it is tokenised, and which batches come out."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from common.errors import UserError
from data import TokenizedTexts, evaluation_batches, load_dataset, micro_batches, pad, tokenize, training_batches
from data.batching import POOL, SLICE
from data.datasets import SAMPLE

SHARED = Path(__file__).parents[2] / "shared"  # AG News itself, which may not be passed on with the project
AG_NEWS_CLASSES = ["World", "Sports", "Business", "Sci/Tech"]
CLS, SEP = 101, 102


@pytest.fixture
def tokenizer(tokenizer_file):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()  # as load_pretrained hands it out
    return tokenizer


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(folder, train, test=None, suffix=".jsonl"):
    """The data set of a new folder with these two files, str or bytes; `test` is `train` unless given."""
    for part, content in [("train", train), ("test", train if test is None else test)]:
        (folder / f"{part}{suffix}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_dataset(str(folder))


# Data sets


def test_jsonl_keeps_texts_labels_and_their_order(tmp_path):
    train = jsonl({"text": "one", "label": 1}, {"text": "two", "label": 0}, {"text": "three", "label": 1})
    dataset = read(tmp_path, train, jsonl({"text": "four", "label": 1}))
    assert dataset.train.texts == ["one", "two", "three"]
    assert dataset.train.labels.tolist() == [1, 0, 1]
    assert dataset.train.labels.dtype == np.int64
    assert (dataset.test.texts, dataset.test.labels.tolist()) == (["four"], [1])
    assert dataset.label_names == ["0", "1"]


def test_label_names_are_numbered_alphabetically_in_both_parts(tmp_path):
    train = jsonl(*({"text": "x", "label": name} for name in ["spam", "ham", "eggs", "ham", "eggs"]))
    dataset = read(tmp_path, train, jsonl({"text": "x", "label": "spam"}))
    assert dataset.label_names == ["eggs", "ham", "spam"]
    assert dataset.train.labels.tolist() == [2, 1, 0, 1, 0]
    assert dataset.test.labels.tolist() == [2]


@pytest.mark.parametrize("label", [0, "pos"])
def test_label_text_names_the_labels(tmp_path, label):
    other = {0: 1, "pos": "neg"}[label]
    train = jsonl({"text": "x", "label": label, "label_text": "Good"}, {"text": "y", "label": other, "label_text": "Bad"})
    names = read(tmp_path, train).label_names
    assert names == (["Good", "Bad"] if label == 0 else ["Bad", "Good"])


def test_a_label_with_another_name_in_the_test_part_is_refused(tmp_path):
    names = [{"text": "x", "label": label, "label_text": name} for label, name in enumerate(["neg", "pos"])]
    swapped = {"text": "y", "label": 0, "label_text": "pos"}
    with pytest.raises(UserError, match=r"test.jsonl, line 3: label 0 is called 'pos', but 'neg' in the training part"):
        read(tmp_path, jsonl(*names), jsonl(*names, swapped))


def test_labels_from_1_are_numbered_from_0(tmp_path):
    dataset = read(tmp_path, jsonl({"text": "x", "label": 2}, {"text": "y", "label": 1}))
    assert dataset.train.labels.tolist() == [1, 0]
    assert dataset.label_names == ["1", "2"]


def test_blank_lines_are_skipped(tmp_path):
    rows = [jsonl({"text": "x", "label": i}) for i in range(2)]
    assert read(tmp_path, "\n" + rows[0] + "\n  \n" + rows[1] + "\n").train.texts == ["x", "x"]


def test_csv_columns_may_be_in_any_order_among_others(tmp_path):
    dataset = read(tmp_path, "id,Label,TEXT\n7,0,one\n8,1,two\n", suffix=".csv")
    assert (dataset.train.texts, dataset.train.labels.tolist()) == (["one", "two"], [0, 1])


def test_csv_keeps_newlines_commas_and_quotes_within_quotes(tmp_path):
    dataset = read(tmp_path, 'text,label\n"one\ntwo, ""three""",0\nfour,1\n', suffix=".csv")
    assert dataset.train.texts == ['one\ntwo, "three"', "four"]


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [("01", [0, 1], ["0", "1"]), ("21", [1, 0], ["1", "2"]), (("no", "yes"), [0, 1], ["no", "yes"])],
)
def test_csv_labels_are_numbers_from_0_or_1_or_names(tmp_path, labels, numbers, names):
    dataset = read(tmp_path, "text,label\n" + "".join(f"x,{label}\n" for label in labels), suffix=".csv")
    assert (dataset.train.labels.tolist(), dataset.label_names) == (numbers, names)


def test_csv_label_text_names_the_labels(tmp_path):
    assert read(tmp_path, "text,label,label_text\nx,1,Good\ny,0,Bad\n", suffix=".csv").label_names == ["Bad", "Good"]


@pytest.mark.parametrize("classes", [None, "World\nSports\n"])
def test_ag_news_csv_joins_title_and_description(tmp_path, classes):
    """Class names come from classes.txt, if there is one."""
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
    dataset = read(tmp_path, '"2","A title","and more"\n"1","B","c, d"\n', suffix=".csv")
    assert dataset.train.texts == ["A title and more", "B c, d"]
    assert dataset.train.labels.tolist() == [1, 0]
    assert dataset.label_names == (["World", "Sports"] if classes else ["1", "2"])


def test_every_class_has_training_rows_whatever_classes_txt_lists(tmp_path):
    (tmp_path / "classes.txt").write_text("A\nB\nC\n")
    dataset = read(tmp_path, "1,x,y\n3,x,y\n", "3,x,y\n", suffix=".csv")
    assert dataset.label_names == ["A", "C"]
    assert (dataset.train.labels.tolist(), dataset.test.labels.tolist()) == ([0, 1], [1])
    with pytest.raises(UserError, match=r"test.csv, line 1: label 2 is not in the training part, which has 1, 3"):
        read(tmp_path, "1,x,y\n3,x,y\n", "2,x,y\n", suffix=".csv")


def test_classes_txt_begins_with_the_name_of_the_lowest_label(tmp_path):
    (tmp_path / "classes.txt").write_text("A\nB\n")
    dataset = read(tmp_path, "text,label\nx,1\ny,0\n", suffix=".csv")
    assert (dataset.train.labels.tolist(), dataset.label_names) == ([1, 0], ["A", "B"])


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (jsonl({"text": "café", "label": 0}, {"text": "thé", "label": 1}), ".jsonl"),
        ("text,label\ncafé,0\nthé,1\n", ".csv"),
        ("1,café,noir\n2,thé,vert\n", ".csv"),
    ],
    ids=["jsonl", "csv", "ag-news-csv"],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, content, suffix, bom, newline):
    (tmp_path / "classes.txt").write_bytes(bom + newline.join(["0", "1", ""]).encode())
    dataset = read(tmp_path, bom + content.replace("\n", newline).encode(), suffix=suffix)
    assert [text.split()[0] for text in dataset.train.texts] == ["café", "thé"]
    assert (dataset.train.labels.tolist(), dataset.label_names) == ([0, 1], ["0", "1"])


def test_a_unicode_line_separator_does_not_end_a_line(tmp_path):
    rows = '{"text": "a\u2028b\x85c", "label": 0}\n{"text": "d", "label": 1}\n'
    assert read(tmp_path, rows).train.texts == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_limit_draws_a_stratified_sample_in_the_order_of_the_file(tmp_path, seed):
    """Of a file sorted by class, too: 60 are "neg", then 30 "pos", and 2 "rare"."""
    labels = ["neg"] * 60 + ["pos"] * 30 + ["rare"] * 2
    dataset = read(tmp_path, jsonl(*({"text": str(i), "label": label} for i, label in enumerate(labels))))
    few = dataset.limited(31, 12, seed)
    assert np.bincount(few.train.labels).tolist() == [20, 10, 1]
    assert np.bincount(few.test.labels).tolist() == [7, 4, 1]
    for part in (few.train, few.test):
        numbers = list(map(int, part.texts))
        assert numbers == sorted(set(numbers))
        assert [labels[i] for i in numbers] == [few.label_names[label] for label in part.labels]
    assert few.train.texts == dataset.limited(31, None, seed).train.texts != dataset.limited(31, None, seed + 1).train.texts
    assert dataset.limited(None, 999, seed).train is dataset.train
    assert dataset.limited(None, 999, seed).test is dataset.test
    with pytest.raises(UserError, match="--train-limit is 2, but there are 3 classes to train on"):
        dataset.limited(2, None, seed)


def test_the_sample_is_balanced_and_without_repetition():
    """All classes have as many texts, of 25 to 60 words each."""
    sample = load_dataset("sample")
    assert sample.label_names == AG_NEWS_CLASSES
    texts = sample.train.texts + sample.test.texts
    assert len(texts) >= 600
    assert len(set(texts)) == len(texts)
    assert all(25 <= len(text.split()) <= 60 for text in texts)
    assert len(sample.test) / len(texts) == pytest.approx(0.2, abs=0.02)
    for split in (sample.train, sample.test):
        assert np.bincount(split.labels, minlength=4).tolist() == [len(split) / 4] * 4


def test_the_sample_has_the_form_of_the_hubs_ag_news():
    for name in ("train.jsonl", "test.jsonl"):
        for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert list(row) == ["text", "label", "label_text"]
            assert row["label_text"] == AG_NEWS_CLASSES[row["label"]]


@pytest.mark.parametrize(("form", "sizes"), [("jsonl", (4000, 999)), ("csv", (1511, 400))])
def test_ag_news_itself_is_read_in_both_its_forms(form, sizes):
    folder = SHARED / f"ag_news_{form}"
    if not folder.is_dir():
        pytest.skip(f"AG News is not at {folder}: it is for research only and no part of this project")
    dataset = load_dataset(str(folder))
    assert (len(dataset.train), len(dataset.test)) == sizes
    assert dataset.label_names == AG_NEWS_CLASSES
    for split in (dataset.train, dataset.test):
        assert set(split.labels.tolist()) == {0, 1, 2, 3}
        assert all(text.strip() for text in split.texts)
    if form == "csv":
        first_row = (folder / "train.csv").read_text(encoding="utf-8").split("\n")[0]
        assert first_row.startswith(f'"{dataset.train.labels[0] + 1}","{dataset.train.texts[0].split(" (AP)")[0]}')


# Tokens


def test_ids_are_those_of_each_text_tokenised_alone(tokenizer, tokenizer_file):
    texts = [*load_dataset("sample").test.texts, "x", "naïve 🦕", "a" * 300]
    tokenized = tokenize(tokenizer, texts, 512)
    alone = Tokenizer.from_file(str(tokenizer_file))
    alone.no_padding()
    alone.no_truncation()
    assert len(tokenized) == len(texts)
    for i, text in enumerate(texts):
        assert tokenized.ids[tokenized.offsets[i] : tokenized.offsets[i + 1]].tolist() == alone.encode(text).ids


def test_offsets_begin_at_0_and_differ_by_the_lengths(tokenizer):
    tokenized = tokenize(tokenizer, ["one", "one two", "one two three"], 512)
    assert tokenized.offsets.tolist() == [0, 3, 7, 12]
    assert tokenized.lengths.tolist() == [3, 4, 5]
    assert len(tokenized.ids) == 12
    assert (tokenized.ids.dtype, tokenized.offsets.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("max_length", [3, 4, 16])
def test_a_text_that_is_cut_keeps_its_first_words_cls_and_sep(tokenizer, max_length):
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    whole = tokenize(tokenizer, [words, "one"], 512)
    cut = tokenize(tokenizer, [words, "one"], max_length)
    assert cut.lengths.tolist() == [max_length, 3]
    assert cut.ids[:max_length].tolist() == [CLS, *whole.ids[1 : max_length - 1], SEP]


def test_more_texts_than_a_slice_come_out_as_they_do_one_by_one(tokenizer):
    texts = [f"text number {i}" for i in range(2 * SLICE + 1)]
    tokenized = tokenize(tokenizer, texts, 512)
    assert len(tokenized) == 2 * SLICE + 1
    for i in (0, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE - 1, 2 * SLICE):
        assert tokenized.ids[tokenized.offsets[i] : tokenized.offsets[i + 1]].tolist() == tokenizer.encode(texts[i]).ids


# Batches


def lengths_of(size, seed=0):
    return np.random.default_rng(seed).integers(3, 200, size=size)


def padded(lengths, batches):
    """Tokens that a model computes over these batches, padding included."""
    return sum(len(batch) * lengths[batch].max() for batch in batches)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 100, POOL * 32, POOL * 32 + 1, 3777])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 5000])
def test_an_epoch_has_every_example_exactly_once(size, batch_size):
    """At most one batch is not full."""
    batches = training_batches(lengths_of(size), batch_size, 0, 0)
    assert np.sort(np.concatenate(batches)).tolist() == list(range(size))
    assert len(batches) == -(-size // batch_size)
    assert sorted(len(batch) for batch in batches)[1:] == [batch_size] * (len(batches) - 1)


@pytest.mark.parametrize("size", [1, 2, 33, 100, 3777])
@pytest.mark.parametrize("tokens", [1, 100, 512, 2048, 10**6])
def test_evaluation_and_micro_batches_keep_the_bound_on_tokens(size, tokens):
    """Both also have every example exactly once, in order of length."""
    lengths = lengths_of(size)
    batch = np.random.default_rng(1).permutation(size)[: 1 + size // 2]
    for whole, parts in [
        (np.arange(size), evaluation_batches(lengths, tokens)),
        (batch, micro_batches(lengths, batch, tokens)),
    ]:
        assert np.sort(np.concatenate(parts)).tolist() == np.sort(whole).tolist()
        assert all(len(part) == 1 or padded(lengths, [part]) <= tokens for part in parts)
        assert (np.diff(lengths[np.concatenate(parts)]) >= 0).all()
    assert len(micro_batches(lengths, batch, 10**9)) == 1
    assert micro_batches(lengths, batch[:0], tokens) == []


def test_micro_batches_are_equal_few_and_pad_less():
    lengths = np.array([10] * 30 + [200, 256])
    batch = np.arange(32)
    parts = micro_batches(lengths, batch, 1024)
    assert [len(part) for part in parts] == [4] * 8
    assert padded(lengths, parts) == 7 * 40 + 4 * 256 < padded(lengths, [batch]) / 6


def test_training_batches_are_a_pure_function_of_seed_and_epoch():
    def flat(seed, epoch):
        return [batch.tolist() for batch in training_batches(lengths_of(500), 32, seed, epoch)]

    np.random.seed(1)
    first = flat(3, 5)
    np.random.seed(2)
    assert flat(3, 5) == first
    others = [flat(3, 6), flat(4, 5), flat(5, 3)]
    assert all(other != first for other in others)


def test_each_epoch_forms_different_batches():
    def together(epoch):
        return {frozenset(batch.tolist()) for batch in training_batches(lengths_of(4000), 32, 0, epoch)}

    assert not together(0) & together(1)


def test_training_batches_are_not_ordered_by_length():
    lengths = lengths_of(POOL * 32)
    means = [lengths[batch].mean() for batch in training_batches(lengths, 32, 0, 0)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.5
    assert np.argmax(means) not in (0, len(means) - 1)


def test_training_batches_pad_a_few_percent():
    """Shuffled batches would pad nearly as much as they have tokens."""
    lengths = lengths_of(4000)
    shuffled = np.split(np.random.default_rng(0).permutation(4000), 125)
    assert padded(lengths, shuffled) > 1.8 * lengths.sum()
    assert padded(lengths, training_batches(lengths, 32, 0, 0)) < 1.06 * lengths.sum()


def test_evaluation_batches_are_sorted_by_length_and_pad_least():
    lengths = lengths_of(4001)
    batches = evaluation_batches(lengths, 1024)
    in_order = lengths[np.concatenate(batches)]
    assert (np.diff(in_order) >= 0).all()
    assert padded(lengths, batches) < padded(lengths, training_batches(lengths, 32, 0, 0))


def test_pad_fills_with_zeros_and_masks_them():
    texts = TokenizedTexts(np.array([101, 7, 102, 101, 102, 101, 8, 9, 102], dtype=np.int32), np.array([0, 3, 5, 9]))
    input_ids, mask = pad(texts, np.array([1, 0]))
    assert input_ids.tolist() == [[101, 102, 0], [101, 7, 102]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    assert (input_ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert pad(texts, np.array([2, 1, 2]))[0].shape == (3, 4)


def test_padded_batches_hold_every_token_of_every_text(tokenizer):
    split = load_dataset("sample").test
    texts = tokenize(tokenizer, split.texts, 64)
    counted = Counter()
    for batch in evaluation_batches(texts.lengths, 900):
        input_ids, mask = pad(texts, batch)
        assert input_ids.shape == mask.shape == (len(batch), texts.lengths[batch].max())
        assert mask.sum(dim=1).tolist() == texts.lengths[batch].tolist()
        counted.update(input_ids[mask].tolist())
    assert counted == Counter(texts.ids.tolist())
