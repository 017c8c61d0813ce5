"""Every form of table in which people keep labelled texts: read, or refused with the words that mend it in one try."""

import csv
import io
import json
import os
import re
from pathlib import Path

import pytest

from common.errors import UserError
from data import Dataset, load_dataset, read_rows
from training.options import Options, parse

TICKETS = [  # 3 classes of 4; commas, semicolons, quotes, an apostrophe, a newline
    ("My invoice is wrong; 20,50 instead of 10,50", "billing"),
    ('I can\'t log in, it says "no"', "login"),
    ("Where is my parcel?", "shipping"),
    ("Refund me, please", "billing"),
    ("The password\nis not accepted", "login"),
    ("The parcel came, broken", "shipping"),
    ("Charged twice", "billing"),
    ("Locked out; again", "login"),
    ("Wrong address", "shipping"),
    ("No invoice", "billing"),
    ("Reset link, expired", "login"),
    ("Lost in the post", "shipping"),
]
ONE_LINE = [(text.replace("\n", " "), label) for text, label in TICKETS]


def table(rows, header=(), delimiter=",", end="\r\n", quoting=csv.QUOTE_MINIMAL) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([*([header] if header else []), *rows])
    return file.getvalue()


def objects(text="text", label="label", rows=TICKETS) -> list[dict]:
    return [{text: said, label: kind} for said, kind in rows]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, files: dict[str, str | bytes]) -> str:
    """The files in `folder`. Returns the path of the only one, or that of the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder if len(files) > 1 else folder / name.split("/")[0])


def load(name: str, typed: str = "") -> Dataset:
    """As train.py loads it with the typed options."""
    options = Options(**parse(["--dataset", name, *re.findall(r"[^ ']+|(?<=')[^']+(?=')", typed)], None))
    return load_dataset(name, options.text_column, options.label_column, options.test_share, options.seed)


def both(dataset: Dataset) -> list[tuple[str, str]]:
    """Every text with the name of its label, of both parts."""
    parts = (dataset.train, dataset.test)
    return sorted((text, dataset.label_names[i]) for part in parts for text, i in zip(part.texts, part.labels, strict=True))


# Thirty tables of tickets: a name, its content, and, if the first try is refused, what the message says and the second try.

BASIC = "--text-column ticket --label-column category"
PANDAS = [(i, text, label) for i, (text, label) in enumerate(TICKETS)]
COLUMNS = ("id", "ticket", "category")
SAYS = "there are 'id', 'ticket', 'category'. Name the columns with --text-column and --label-column"
NUMBERED = [(i, {"billing": 0, "login": 1, "shipping": 4}[label], text) for i, (text, label) in enumerate(ONE_LINE)]
ACCEPTED = {
    "tickets.csv": table(TICKETS, ("text", "label")),
    "Tickets.CSV": table(TICKETS, ("Text", "Label"), end="\n"),
    "quoted.csv": table(TICKETS, ("text", "label"), quoting=csv.QUOTE_ALL),
    "mark.csv": "\ufeff" + table(TICKETS, ("text", "label")),
    "excel-german.csv": "\ufeff" + table(TICKETS, ("text", "label"), ";"),
    "excel-sep.csv": "sep=;\r\n" + table(TICKETS, ("text", "label"), ";"),
    "excel-unicode.txt": table(ONE_LINE, ("text", "label"), "\t").encode("utf-16"),
    "utf-16-without-a-mark.csv": table(TICKETS, ("text", "label")).encode("utf-16-le"),
    "pipes.csv": table(TICKETS, ("text", "label"), "|"),
    "tabs.csv": table(ONE_LINE, ("text", "label"), "\t"),
    "tabs.tsv": table([(label, text) for text, label in ONE_LINE], ("label", "text"), "\t", quoting=csv.QUOTE_ALL),
    "index.csv": table(PANDAS, ("", "text", "label")),
    "other-columns.csv": table([(i, text, "open", label) for i, text, label in PANDAS], ("id", "text", "status", "label")),
    "empty-columns.csv": table([(*row, "", "") for row in TICKETS], ("text", "label", "", "")),
    "empty-ends.csv": table([(*row, "", "") for row in TICKETS], ("text", "label")),
    "empty-rows.csv": table([*TICKETS, ("", ""), ("", "")], ("text", "label")),
    "two.csv": table(TICKETS, ("text", "category")),
    "spaces.csv": table([(text, f" {label} ") for text, label in TICKETS], (" text", "label ")),
    "without-header.csv": table(TICKETS),
    "without-header.tsv": table([(label, text) for text, label in ONE_LINE], (), "\t"),
    "lines.jsonl": lines(objects()),
    "lines.ndjson": lines(objects()),
    "lines.json": lines(objects("Text", "Label")),
    "array.json": json.dumps(objects()),
    "pandas.json": json.dumps(objects(), indent=2),
    "array.jsonl": json.dumps(objects()),
    "folder/Train.CSV": table(TICKETS, ("text", "label")),
}
WITH_TABS = ("excel-unicode.txt", "tabs.csv", "tabs.tsv", "without-header.tsv")
MENDED = {
    "tickets.csv": (table(PANDAS, COLUMNS), SAYS, BASIC),
    "german.csv": (table(PANDAS, COLUMNS, ";"), SAYS, BASIC),
    "other.jsonl": (lines([{"id": 7, "ticket": text, "category": label} for text, label in TICKETS]), SAYS, BASIC),
    "three.csv": (
        table([(label, *text.split(" ", 1)) for text, label in TICKETS], ("queue", "subject", "body")),
        "there are 'queue', 'subject', 'body'. Name",
        "--text-column subject body --label-column QUEUE",
    ),
    "index.csv": (
        table(NUMBERED),
        "12 of 12 rows have a label that no other row has (text from title + description, label from class; "
        "the file has no header). Name the columns with --text-column and --label-column (by number",
        "--text-column 3 --label-column 2",
    ),
    "numbers.csv": (table(PANDAS, COLUMNS), SAYS, "--text-column 2 --label-column 3"),
    "six.csv": (
        table([(label, i, "Monday", "x", "y", text) for i, (text, label) in enumerate(TICKETS)]),
        "there are 1 ('billing'), 2 ('0'), 3 ('Monday'), 4 ('x'), 5 ('y'), 6 ('My invoice is wrong; ",
        "--label-column 1 --text-column 6",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_table_is_accepted_at_once(tmp_path, name):
    dataset = load(write(tmp_path, {name: ACCEPTED[name]}))
    assert both(dataset) == sorted(ONE_LINE if name in WITH_TABS else TICKETS)
    assert dataset.label_names == ["billing", "login", "shipping"]


@pytest.mark.parametrize("name", MENDED)
def test_a_table_that_is_refused_is_mended_by_the_option_that_the_message_names(tmp_path, name):
    content, says, typed = MENDED[name]
    path = write(tmp_path, {name: content})
    with pytest.raises(UserError) as caught:
        load(path)
    assert says in str(caught.value)
    dataset = load(path, typed)
    assert {text for text, _ in both(dataset)} == {text for text, _ in (ONE_LINE if name == "index.csv" else TICKETS)}
    assert dataset.label_names == (["0", "1", "4"] if name == "index.csv" else ["billing", "login", "shipping"])


def test_excels_file_in_windows_1252_is_mended_by_the_command_that_the_message_names(tmp_path):
    rows = [(text.replace("parcel", "Päckchen"), label) for text, label in TICKETS]
    path = write(tmp_path, {"tickets.csv": table(rows, ("text", "label"), ";").encode("cp1252")})
    with pytest.raises(UserError, match=r"line 4: not UTF-8 \(if .*Päckchen.* reads right: iconv -f WINDOWS-1252 -t UTF-8 "):
        load(path)
    Path(path).write_text(Path(path).read_text(encoding="cp1252"), encoding="utf-8")  # what iconv does
    assert both(load(path)) == sorted((text.replace("\r\n", "\n"), label) for text, label in rows)


# The commonest forms of public data sets, with rows of our own.

SIGNS = {1: "World", 2: "Sports", 3: "Business", 4: "Sci/Tech"}
NEWS = [(number, f"Title {i}, {name}", f'Prices "rose"; {i}') for i in range(3) for number, name in SIGNS.items()]
NEWS_TEXTS = sorted((f"{title} {description}", str(number)) for number, title, description in NEWS)
MOODS = [
    (f"a film that is {word} , and ` long '", i % 2) for i, word in enumerate(["bad", "good", "poor", "fine", "sad", "fun"])
]
MOOD_TEXTS = sorted((text, str(label)) for text, label in MOODS)
REVIEWS = [
    (f'A film.<br /><br />It\'s {word}, "really".', ["negative", "positive"][i % 2]) for i, (word, _) in enumerate(MOODS)
]
SMS = [
    ("ham", "Ok, on my way"),
    ("spam", "WIN a prize; call 09061701461"),
    ("ham", '"Speak only when'),
    ("ham", 'I\'ll "call" later'),
]
SMS = [*SMS, *((label, text + " again") for label, text in SMS)]
SMS_TEXTS = sorted((text, label) for label, text in SMS)
FEELINGS = [(f"i feel {word}", name) for word, name in [("low", "sadness"), ("great", "joy"), ("cross", "anger")] * 2]
FEELING_TEXTS = sorted(FEELINGS)
CODED = [(text, ["anger", "joy", "sadness"].index(name)) for text, name in FEELINGS]
IMDB = {f"{part}/{label[:3]}/{i}_{i}.txt": text for part in ("train", "test") for i, (text, label) in enumerate(REVIEWS)} | {
    "train/unsup/0_0.txt": "No label."
}
PUBLIC = {
    "AG News: csv": ({"train.csv": table(NEWS, quoting=csv.QUOTE_ALL), "test.csv": table(NEWS)}, "", NEWS_TEXTS),
    "AG News: Kaggle": (
        {f"{part}.csv": table(NEWS, ("Class Index", "Title", "Description")) for part in ("train", "test")},
        "",
        NEWS_TEXTS,
    ),
    "AG News: SetFit": (
        {
            f"{part}.jsonl": lines([{"text": f"{a} {b}", "label": i - 1, "label_text": SIGNS[i]} for i, a, b in NEWS])
            for part in ("train", "test")
        },
        "",
        sorted((f"{a} {b}", SIGNS[i]) for i, a, b in NEWS),
    ),
    "SST-2: GLUE": ({"train.tsv": "".join(f"{a}\t{b}\n" for a, b in [("sentence", "label"), *MOODS])}, "", MOOD_TEXTS),
    "SST-2: without header": (
        {f"{part}.tsv": "".join(f"{a}\t{b}\n" for a, b in MOODS) for part in ("train", "dev", "test")},
        "",
        MOOD_TEXTS,
    ),
    "SST-2: SetFit": (
        {
            f"{part}.jsonl": lines([{"text": a, "label": b, "label_text": "np"[b]} for a, b in MOODS])
            for part in ("train", "dev", "test")
        },
        "",
        sorted((text, "np"[label]) for text, label in MOODS),
    ),
    "SST-2: idx": (
        {"train.csv": table([(i, *row) for i, row in enumerate(MOODS)], ("idx", "sentence", "label"))},
        "--text-column sentence",
        MOOD_TEXTS,
    ),
    "IMDb: aclImdb": (IMDB, "", sorted((text, label[:3]) for text, label in REVIEWS)),
    "IMDb: Kaggle": (
        {"IMDB Dataset.csv": table(REVIEWS, ("review", "sentiment"), end="\n")},
        "--text-column review --label-column sentiment",
        sorted(REVIEWS),
    ),
    "SMS spam: UCI": ({"SMSSpamCollection": "".join(f"{a}\t{b}\n" for a, b in SMS)}, "", SMS_TEXTS),
    "SMS spam: Kaggle": (
        {"spam.csv": table([(*row, "", "", "") for row in SMS], ("v1", "v2", "", "", ""))},
        "--text-column v2 --label-column v1",
        SMS_TEXTS,
    ),
    "SMS spam: hub": ({"train.csv": table([(b, a) for a, b in SMS], ("sms", "label"))}, "", SMS_TEXTS),
    "emotion: Kaggle": (
        {f"{part}.txt": "".join(f"{a};{b}\n" for a, b in FEELINGS) for part in ("train", "test", "val")},
        "",
        FEELING_TEXTS,
    ),
    "emotion: hub": (
        {f"{part}.jsonl": lines([{"text": a, "label": b} for a, b in CODED]) for part in ("train", "test", "validation")},
        "",
        sorted((text, str(label)) for text, label in CODED),
    ),
    "emotion: text.csv": (
        {"text.csv": table([(i, *row) for i, row in enumerate(CODED)], ("", "text", "label"))},
        "",
        sorted((text, str(label)) for text, label in CODED),
    ),
    "emotion: final": (
        {"Emotion_final.csv": table(FEELINGS, ("Text", "Emotion"))},
        "",
        FEELING_TEXTS,
    ),
    "emotion: tweets": (
        {"tweet_emotions.csv": table([(i, b, a) for i, (a, b) in enumerate(FEELINGS)], ("tweet_id", "sentiment", "content"))},
        "--text-column content --label-column sentiment",
        FEELING_TEXTS,
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_data_set_is_read_in_its_commonest_forms_with_at_most_two_options(tmp_path, name):
    files, typed, expected = PUBLIC[name]
    assert typed.count("--") <= 2
    dataset = load(write(tmp_path, files), typed)
    if len(files) == 1:
        assert both(dataset) == expected
    else:
        assert both(dataset) == sorted(expected * 2)
    has_validation = any(re.match(r"(dev|val)", file) for file in files)
    assert (dataset.validation is not None) == has_validation


# What the rows keep, and what is put aside


def test_a_row_keeps_all_its_fields_under_the_names_of_the_file(tmp_path):
    path = Path(write(tmp_path, {"a.csv": " ID;Title;Description;\r\n7;Oil;rose, then fell;x\r\n"}))
    assert list(read_rows(path)) == [
        (2, "Oil rose, then fell", None, {"ID": "7", "Title": "Oil", "Description": "rose, then fell", "4": "x"})
    ]
    assert [row.text for row in read_rows(path, ["description"])] == ["rose, then fell"]
    with pytest.raises(UserError, match=r'line 1: no column is called "body"; there are .*Name the column with --text-column'):
        next(read_rows(path, ["Title", "body"]))


def test_a_text_file_to_label_has_a_text_on_each_line_whatever_it_looks_like(tmp_path):
    path = Path(write(tmp_path, {"a.txt": 'text;label\n["x", 1]\n\n'}))
    assert [row.text for row in read_rows(path)] == ["text;label", '["x", 1]', ""]


def test_numbers_are_not_taken_for_texts(tmp_path):
    for name, content in {
        "a.csv": table([(i, label) for i, (_, label) in enumerate(TICKETS)], ("id", "label")),
        "a.jsonl": lines([{"id": i, "label": label} for i, (_, label) in enumerate(TICKETS)]),
    }.items():
        with pytest.raises(UserError, match="no column is called \"text\"; there are 'id', 'label'"):
            load(write(tmp_path, {name: content}))


def test_labels_are_stripped_and_composed_in_every_form(tmp_path):
    said = [("x", "caf\u00e9"), ("y", "cafe\u0301 "), ("z", "World"), ("w", "World\u00a0")]
    for name, content in {"a.csv": table(said, ("text", "label")), "a.jsonl": lines(objects(rows=said))}.items():
        assert load(write(tmp_path, {name: content})).label_names == ["World", "café"]


def test_labels_that_differ_only_in_case_are_pointed_out(tmp_path):
    said = [("x", "World"), ("y", "world"), ("z", "World"), ("w", "world")]
    notes = load(write(tmp_path, {"a.csv": table(said, ("text", "label"))})).notes
    assert "the classes 'World' and 'world' differ only in case; if they are one, spell them alike" in notes


@pytest.mark.parametrize(
    ("labels", "names"), [([0, 4], "04"), ([1, 2, 5], "125"), ([-1, 1], ["-1", "1"]), ([10, 9], ["9", "10"])]
)
def test_labels_with_gaps_are_classes_like_others(tmp_path, labels, names):
    rows = [("x", label) for label in labels * 2]
    for name, content in {"a.csv": table(rows, ("text", "label")), "a.jsonl": lines(objects(rows=rows))}.items():
        assert load(write(tmp_path, {name: content})).label_names == list(names)


def test_one_file_puts_a_stratified_share_aside_which_depends_on_the_seed_alone(tmp_path):
    rows = [(f"text {i}", label) for i, label in enumerate(["a"] * 60 + ["b"] * 20 + ["c"] * 2 + ["d"])]
    path = write(tmp_path, {"a.csv": table(rows, ("text", "label"))})
    dataset = load(path)
    assert "a.csv: 8 of 83 rows are put aside to test on (--test-share 0.1)" in dataset.notes
    assert both(dataset) == sorted(rows)
    counts = [[part.labels.tolist().count(i) for i in range(4)] for part in (dataset.train, dataset.test)]
    assert counts[1][2:] == [1, 0]
    assert counts[1][0] + counts[1][1] == 7
    assert 4 <= counts[1][0] <= 6
    assert load(path, "--seed 0").test.texts == dataset.test.texts != load(path, "--seed 1").test.texts
    half = load(path, "--test-share 0.5")
    assert len(half.test) == round(0.5 * 83)
    assert all(half.train.labels.tolist().count(i) for i in range(4))


def test_a_test_share_is_not_forgotten_where_there_is_a_test_part(tmp_path):
    content = table(TICKETS, ("text", "label"))
    folder = write(tmp_path, {"train.csv": content, "test.csv": content})
    with pytest.raises(UserError, match=r"has a test part, test\.csv: leave out --test-share"):
        load(folder, "--test-share 0.2")


def test_a_line_without_an_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("data.tables.LONGEST_LINE", 1000)
    (tmp_path / "texts.txt").write_text("short\n" + 1001 * "x")
    with pytest.raises(UserError, match=r"texts\.txt, line 2: longer than 1,000 characters"):
        list(read_rows(tmp_path / "texts.txt"))
    (tmp_path / "texts.txt").write_text(f"short\n{999 * 'x'}\nlast")
    assert [row.text for row in read_rows(tmp_path / "texts.txt")] == ["short", 999 * "x", "last"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_in_place_of_a_part_is_refused(tmp_path):
    os.mkfifo(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"train\.csv is not a regular file"):
        load_dataset(str(tmp_path))
