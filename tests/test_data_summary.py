"""What is printed about the data before training, and about each class after it."""

import re

import numpy as np
import pytest

from common.errors import UserError
from data import TokenizedTexts, load_dataset
from data.datasets import Dataset, Split
from training.data_summary import describe_data, describe_scores
from training.evaluation import Examples
from training.options import parse


def described(train: list[tuple[str, int]], test: list[tuple[str, int]], names: list[str], cut: int = 0) -> list[str]:
    parts = [Split([text for text, _ in rows], np.array([label for _, label in rows])) for rows in (train, test)]
    tokens = TokenizedTexts(np.array([0]), np.array([0, 1]), cut)
    return describe_data(Dataset(*parts, names), *(Examples(tokens, part.labels) for part in parts), max_length=8)


def test_the_baseline_is_the_largest_class_of_the_test_part():
    train = [("a", 0), ("b", 0), ("c", 1)]
    test = [*((f"x{i}", 1) for i in range(17)), *((f"y{i}", 0) for i in range(3))]
    lines = described(train, test, ["Login", "Billing"])
    assert lines == ["  Login                2 + 3", "  Billing              1 + 17", "  always 'Billing': accuracy 0.850"]


def test_known_and_cut_texts_and_untested_classes_are_counted():
    train, test = [("one text", 0), ("two", 1), ("three", 2)], [("One  text ", 0), ("four", 0)]
    assert described(train, test, ["a", "b", "c"], cut=2)[4:] == [
        "2 of 3 classes are not in the test part, and are not tested: 'b', 'c'",
        "4 of 5 texts are cut at 8 tokens (--max-length)",
        "1 of 2 test texts are also in the training part: the scores will be too good",
    ]


def test_only_so_many_classes_are_listed():
    lines = described([("a", i) for i in range(22)], [("b", 0)], [f"class {i}" for i in range(22)])
    assert lines[20:22] == ["  and 2 more classes", "  always 'class 0': accuracy 1.000"]
    assert lines[22].count("'class") == 20


def test_cut_texts_are_counted_where_they_are_cut(tokenizer_file):
    from tokenizers import Tokenizer

    from data import tokenize

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = ["a b c", "a b c d", "a " * 5000, ""]
    for max_length, cut in [(5, 2), (6, 1), (4, 3), (10_000, 0)]:
        assert tokenize(tokenizer, texts, max_length).cut == cut


def test_a_class_that_is_never_predicted_is_told():
    names = ["a", "b", "c"]
    lines = describe_scores(np.array([[3, 0, 0], [1, 0, 0], [0, 0, 0]]), names)
    assert [line.split(maxsplit=3)[3] for line in lines[:3]] == ["0.8571", "0.0000", "does not occur"]
    assert lines[3:] == ["  predicts 1 of 3 classes"]
    assert len(describe_scores(np.array([[3, 0, 0], [1, 1, 0], [0, 0, 0]]), names)) == 3


def test_all_empty_cells_are_counted_at_once(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("text,label\nx,a\n ,a\n,b\ny,\nz,b\n,\n")
    counted = "In all, 2 texts and 1 label are empty (lines 3, 4, 5)"
    expected = f"t.csv, line 3: the text is empty. {counted}; fill them in or remove the rows"
    with pytest.raises(UserError, match=re.escape(expected)):
        load_dataset(str(table))
    for kind in ("neg", "pos"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        (tmp_path / "train" / kind / "1.txt").write_text("")
    with pytest.raises(UserError, match=r"2 texts are empty \(files neg/1.txt, pos/1.txt\)"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--epoch", "3"], "unrecognized arguments: --epoch 3. Did you mean --epochs? See "),
        (["--seed", "1", "--learning_rate", "1"], "--learning_rate 1. Did you mean --learning-rate? See "),
        (["--frobnicate"], "unrecognized arguments: --frobnicate. See "),
        (["sample"], "unrecognized arguments: sample. See "),
    ],
)
def test_a_mistyped_option_gets_a_hint(words, hint):
    with pytest.raises(UserError, match=re.escape(hint)):
        parse(words, None)


def test_a_mistyped_data_set_gets_a_hint():
    with pytest.raises(UserError, match=r"sample\. Did you mean ag_news\?$"):
        load_dataset("agnews")
