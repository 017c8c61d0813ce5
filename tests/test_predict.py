"""Labels for new text: as in the run that trained, in the order of the input, and in bounded memory."""

import contextlib
import csv
import json
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from processes import python

import predict
from common.errors import UserError
from data import Row, load_dataset, open_table, read_rows, read_texts
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained
from training import inference
from training.evaluation import confusion_matrix
from training.inference import in_parts, load_classifier

ROOT = Path(__file__).parent.parent
NAMES = ["World", "Sports", "Business", "Sci/Tech"]


def labelled(capsys, *arguments: object) -> list[dict]:
    assert predict.main([str(argument) for argument in arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, *arguments: object) -> str:
    assert predict.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@contextlib.contextmanager
def standard_input(path: Path) -> Iterator[None]:
    before = os.dup(0)
    with open(path, "rb") as file:
        os.dup2(file.fileno(), 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_the_test_part_is_labelled_as_in_the_run_that_trained(whole_run, capsys):
    folder = whole_run[0]
    answers = labelled(capsys, folder, "--input", ROOT / "data" / "sample" / "test.jsonl")
    test = load_dataset("sample").test
    assert [answer["text"] for answer in answers] == test.texts
    predictions = np.array([NAMES.index(answer["label"]) for answer in answers])
    expected = np.array(json.loads((folder / "results.json").read_text())["after"]["confusion_matrix"])
    moved = np.abs(confusion_matrix(test.labels, predictions, 4) - expected).sum()
    assert moved <= 2  # a text on the brink at most: there the adapters are beside the weights, here merged into them
    for answer in answers:
        assert list(answer["scores"]) == NAMES
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-6)
        assert answer["score"] == max(answer["scores"].values()) == answer["scores"][answer["label"]]


def test_a_text_on_the_command_line_gives_a_table_sorted_by_score(whole_run, capsys):
    assert predict.main([str(whole_run[0]), "The striker scored twice in the final.", "Oil prices fell."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "The striker scored twice in the final."
    assert lines[1].split()[1] == "Sports"
    assert lines[6].split()[1] == "Business"
    scores = [float(line.split()[0]) for line in lines[1:5]]
    assert scores == sorted(scores, reverse=True)
    assert {line.split()[1] for line in lines[1:5]} == set(NAMES)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".CSV", "stdin"])
def test_every_kind_of_input_is_labelled_in_its_order(whole_run, capsys, tmp_path, monkeypatch, suffix):
    """Whatever the texts are: empty, long, from right to left, with quotes."""
    texts = ["Shares rose.", "", "   ", "\U0001f600 \u05e9\u05dc\u05d5\u05dd", "x" * 100_000, 'a "quote", a comma', "Goal!"] * 3
    path = tmp_path / f"texts{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "more": 1}) + "\n\n" for text in texts), encoding="utf-8")
    elif suffix.lower() == ".csv":
        quoted = (text.replace('"', '""') for text in texts)
        path.write_text("id, Text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(quoted)), encoding="utf-8")
    else:
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    monkeypatch.setattr(inference, "CHUNK", 4)
    if suffix == "stdin":
        with standard_input(path):
            answers = labelled(capsys, whole_run[0])
    else:
        answers = labelled(capsys, whole_run[0], "--input", path)
    assert [answer["text"] for answer in answers] == texts
    assert [answer["label"] for answer in answers[:7]] == [answer["label"] for answer in answers[7:14]]


def test_no_more_texts_are_taken_than_fit_in_a_chunk_before_the_first_is_answered(whole_run, monkeypatch):
    monkeypatch.setattr(inference, "CHUNK", 4)
    classifier = load_classifier(whole_run[0], device="cpu", max_length=32)
    taken = []
    answers = classifier.label(taken.append(i) or f"text {i}" for i in range(100))
    assert next(answers)["text"] == "text 0"
    assert taken == [0, 1, 2, 3]


needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="int8 runs on x86 processors")


@needs_x86
def test_int8_gives_the_labels_of_float32(whole_run):
    """All but ties: classes of which float32 itself is not sure."""
    texts = load_dataset("sample").test.texts
    exact, rounded = (load_classifier(whole_run[0], device="cpu", max_length=32, dtype=dtype) for dtype in ("float32", "int8"))
    pairs = list(zip(exact.label(texts), rounded.label(texts), strict=True))
    changes = [max(abs(one["scores"][name] - other["scores"][name]) for name in NAMES) for one, other in pairs]
    assert 0 < np.mean(changes) < 0.02  # 0.008 without VNNI, 0.006 with it; torch's quantize_dynamic: 0.047
    for one, other in pairs:
        assert one["label"] == other["label"] or one["score"] - one["scores"][other["label"]] < 0.2


@needs_x86
@pytest.mark.parametrize(("agreement", "taken"), [(0.99, "int8"), (1.01, "float32")])
def test_auto_takes_int8_where_it_is_the_fastest_and_agrees(whole_run, monkeypatch, agreement, taken):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("training.device.time_products", lambda dtypes: {dtype: float(dtype.itemsize) for dtype in dtypes})
    monkeypatch.setattr(inference, "AGREEMENT", agreement)
    texts = load_dataset("sample").test.texts[:16]
    alone = load_classifier(whole_run[0], device="cpu", max_length=32)
    assert (alone.runner.dtype, "int8" in alone.arithmetic) == (torch.float32, False)  # without texts to compare on
    classifier = load_classifier(whole_run[0], device="cpu", max_length=32, sample=texts)
    assert classifier.runner.dtype == getattr(torch, taken)
    assert re.search(r"1[56] of 16 labels as in float32, and a score moves by 0\.\d\d\d at most", classifier.arithmetic)


@needs_x86
def test_int8_is_compared_with_float32_on_empty_texts_too(small_model):
    classifier = load_classifier(small_model, device="cpu", dtype="int8", sample=["", " "])
    assert "2 of 2 labels as in float32" in classifier.arithmetic


@pytest.mark.parametrize(("rows", "compared"), [(30, 0), (40, 8), (70, 8)])
def test_int8_is_only_tried_on_long_files(whole_run, monkeypatch, tmp_path, capsys, rows, compared):
    samples = []
    real = predict.load_classifier
    monkeypatch.setattr(predict, "load_classifier", lambda *args: samples.append(list(args[-1])) or real(*args[:-1]))
    monkeypatch.setattr(inference, "CHUNK", 40)
    monkeypatch.setattr(predict, "CHUNK", 40)
    monkeypatch.setattr(predict, "SAMPLE", 8)
    texts = [f"text {i}" for i in range(rows)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    answers = labelled(capsys, whole_run[0], "--input", tmp_path / "texts.txt", "--max-length", "16", "--dtype", "float32")
    assert samples == [texts[:compared]]
    assert [answer["text"] for answer in answers] == texts


def test_json_on_demand_and_texts_beside_a_file_refused(whole_run, capsys, tmp_path):
    assert labelled(capsys, whole_run[0], "--json", "Goal!")[0]["text"] == "Goal!"
    assert "both texts and --input" in refused(capsys, whole_run[0], "Goal!", "--input", tmp_path)


def test_an_adapter_written_by_peft_is_taken_with_the_base_that_it_or_the_user_names(tmp_path, tokenizer_file, capsys):
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3)
    base = tmp_path / "base"
    save_pretrained(DistilBertForSequenceClassification(config), Tokenizer.from_file(str(tokenizer_file)), base)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_lin"]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.eval().save_pretrained(tmp_path / "adapter")
    answer = labelled(capsys, tmp_path / "adapter", "--json", "A text.")[0]
    ids = torch.tensor([Tokenizer.from_file(str(tokenizer_file)).encode("A text.").ids])
    expected = theirs(input_ids=ids).logits.softmax(dim=-1)[0]
    assert list(answer["scores"]) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert list(answer["scores"].values()) == pytest.approx(expected.tolist(), abs=0.05)  # in bfloat16, if the machine has it

    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    assert "Pass it with --model" in refused(capsys, tmp_path / "adapter", "A text.")
    assert labelled(capsys, tmp_path / "adapter", "--json", "A text.", "--model", base)[0] == answer
    assert "Load the base model of the adapter" in refused(capsys, tmp_path / "adapter", "A text.", "--model", "minilm")


def test_what_the_user_can_mend_is_one_line_and_status_2(whole_run, capsys, tmp_path):
    assert "is not an adapter" in refused(capsys, tmp_path, "A text.")
    assert "--max-length is 513" in refused(capsys, whole_run[0], "A text.", "--max-length", 513)
    assert "cannot be read" in refused(capsys, whole_run[0], "--input", tmp_path / "none.txt")
    assert "--device: invalid choice: 'gpu'" in refused(capsys, whole_run[0], "A text.", "--device", "gpu")
    assert "unrecognized" in refused(capsys, whole_run[0], "--frobnicate")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": 7}\n', "line 2: the text 7 is not a string"),
        ("digits.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
        ("bad.jsonl", b'{"text": "a"}\n[]\n', "line 2: not a JSON object"),
        ("bad.jsonl", b"\n{\n", "line 2: not JSON"),
        ("bad.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text contains half a character"),
        ("bad.csv", b"title,body\na,b\n", 'line 1: no column is called "text"'),
        ("bad.csv", b'text\n"never closed\n', "line 2: .* not CSV"),
        ("bad.csv", b"text,id\na,1\nb\n", "line 3: 1 fields, but 2 columns"),
        ("bad.csv", b"text,id\n" + b"a,1\n" * 5000 + b"\xff,1\n", "line 5002: not UTF-8"),
        ("bad.txt", b"fine\n\xff\n", "line 2: not UTF-8"),
    ],
)
def test_a_bad_input_is_refused_with_file_and_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}, .*{says}"):
        list(read_texts(path))


def test_texts_are_read_as_they_arrive():
    reading, writing = os.pipe()
    texts = read_texts(Path(f"/dev/fd/{reading}"))
    for text in ("one", "two"):
        os.write(writing, f"{text}\n".encode())
        assert next(texts) == text
    os.close(writing)
    os.close(reading)
    assert list(texts) == []


def test_a_closed_standard_input_is_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    with standard_input(tmp_path / "empty"):
        os.close(0)
        with pytest.raises(UserError, match="standard input cannot be read: Bad file descriptor"):
            next(read_texts(None))


def test_the_csv_of_ag_news_can_be_labelled_too(tmp_path):
    (tmp_path / "test.csv").write_text('"3","Oil rises","Prices, too."\n')
    assert list(read_texts(tmp_path / "test.csv")) == ["Oil rises Prices, too."]


def test_a_reader_that_leaves_early_is_no_error(whole_run, tmp_path):
    (tmp_path / "many.txt").write_text("A text that is labelled.\n" * 3000)
    command = [sys.executable, ROOT / "predict.py", whole_run[0], "--input", tmp_path / "many.txt"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["text"] == "A text that is labelled."
    process.stdout.close()
    assert process.stderr is not None
    assert [line.split(" in ")[0] for line in process.stderr.read().splitlines()] == ["arithmetic"]
    assert process.wait(timeout=60) == 0


def test_the_embedded_encoder_is_found_under_the_name_in_the_adapter(whole_run):
    config = json.loads((whole_run[0] / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "minilm"
    assert load_pretrained(config["base_model_name_or_path"], 4)[0].config.dim == 384


STRANGE = [
    "",
    "   ",
    "a\0b",
    "\N{SAUROPOD} \U0001f468\u200d\U0001f469\u200d\U0001f467",  # one family, of five characters
    "\u05e9\u05dc\u05d5\u05dd \u202ereversed\u202c",  # right to left, and made so
    "lines\u2028which\x85are\x0bnone",
    "\ufeffa mark in front",
    '"quoted", \\ud83d and \\',
    "x" * 1_000_000,
    "\U0001f996" * 300_000,
]


@pytest.mark.parametrize(
    ("suffix", "encoding"),
    [
        pytest.param(".txt", "utf-8", marks=pytest.mark.slow),
        (".jsonl", "latin-1"),
        (".csv", "ascii"),
        pytest.param("stdin", "utf-8", marks=pytest.mark.slow),
    ],
)
def test_strange_texts_get_a_line_of_json_each(whole_run, tmp_path, suffix, encoding):
    """The line has the text unchanged in every encoding of the console."""
    texts = ["First.", *STRANGE]
    path = tmp_path / f"texts{suffix}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        if suffix == ".csv":
            csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
        elif suffix == ".jsonl":
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)  # emoji as pairs of escapes
        else:
            file.writelines(text + "\n" for text in texts)
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:surrogateescape"}
    where = [] if suffix == "stdin" else ["--input", path]
    done = python("predict.py", whole_run[0], *where, env=environment, stdin=path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.encode(errors="surrogateescape").decode(encoding)
    answers = [json.loads(line) for line in printed.split("\n")[:-1]]
    assert [answer["text"] for answer in answers] == texts
    for answer in answers:
        if answer["text"].strip():
            assert answer["label"] in NAMES
            assert 0 < answer["score"] <= 1
        else:
            assert (answer["label"], answer["reason"]) == ("", "the text is empty")


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        (".jsonl", b'{"text": "a \\ud83d b"}\n', "line 1: the text contains half a character"),  # half an emoji
        pytest.param(".jsonl", b'{"text": "\xed\xa0\xbd"}\n', "not UTF-8", marks=pytest.mark.slow),  # the same in bytes
        pytest.param(".txt", b"caf\xe9\n", "not UTF-8", marks=pytest.mark.slow),
        ("stdin", b"caf\xe9\n", "standard input, line 1: not UTF-8"),
        (".csv", b"text,id\nOil rose, they say,1\n", "line 2: 3 fields, but 2 columns"),
    ],
)
def test_half_a_character_or_text_is_refused_in_one_line(whole_run, tmp_path, suffix, content, says):
    path = tmp_path / f"texts{suffix}"
    path.write_bytes(content)
    done = python("predict.py", whole_run[0], *([] if suffix == "stdin" else ["--input", path]), stdin=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_text_on_the_command_line_may_be_any_that_is_utf_8(whole_run, capsys):
    texts = [text for text in STRANGE if len(text) < 1000]
    assert [answer["text"] for answer in labelled(capsys, whole_run[0], "--json", *texts)] == texts
    assert r"'caf\udce9' on the command line is not UTF-8" in refused(capsys, whole_run[0], "--json", "caf\udce9")


# A table in, a table out


def answered(capsys, model: Path, source: Path, target: Path, *options: object) -> str:
    """Label a file into another. Returns what was printed to standard error."""
    command = [model, "--input", source, "--output", target, *options]
    assert predict.main([str(argument) for argument in command]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"saved {target}\n"
    return captured.err


CSV = 'id,Ticket text,when\r\n7,"a ""quoted"", text",2024\r\n08,"two\nlines",\r\n'
TSV = 'Ticket text\tid\na "b" c\t1\n'
JSONL = (
    '{"id": 7, "Ticket text": "a \\ud83e\\udd96", "tags": ["x", null], "half": "\\ud800"}\n{"id": 1.50, "Ticket text": "b"}\n'
)


@pytest.mark.parametrize(
    ("source", "target", "content", "expected"),
    [
        (".csv", ".csv", CSV, 'id,Ticket text,when,label,score\n7,"a ""quoted"", text",2024,{}\n08,"two\nlines",,{}\n'),
        (".csv", ".tsv", "id;text\n1;a\n", "id\ttext\tlabel\tscore\n1\ta\t{}\n"),
        (".tsv", ".tsv", TSV, 'Ticket text\tid\tlabel\tscore\n"a ""b"" c"\t1\t{}\n'),
        (".csv", ".jsonl", "text,n\nx,1\n", '{{"text": "x", "n": "1", {}}}\n'),
        (
            ".jsonl",
            ".JSONL",
            JSONL,
            '{{"id": 7, "Ticket text": "a \U0001f996", "tags": ["x", null], "half": "\\ud800", {}}}\n'
            '{{"id": 1.5, "Ticket text": "b", {}}}\n',
        ),
        (
            ".jsonl",
            ".csv",
            JSONL,
            'id,Ticket text,tags,half,label,score\n7,a \U0001f996,"[""x"", null]",\\ud800,{}\n1.5,b,,,{}\n',
        ),
        (
            ".json",
            ".jsonl",
            '[{"text": "a"},\n{"text": "b", "more": 1}]',
            '{{"text": "a", {}}}\n{{"text": "b", "more": 1, {}}}\n',
        ),
        (".txt", ".csv", "one, two\nthree\n", 'text,label,score\n"one, two",{}\nthree,{}\n'),
    ],
)
def test_a_table_keeps_its_columns_and_gets_label_and_score(small_model, capsys, tmp_path, source, target, content, expected):
    path, output = tmp_path / f"in{source}", tmp_path / f"out{target}"
    path.write_text(content, encoding="utf-8", newline="")
    column = ["--text-column", "Ticket text"] if "Ticket" in content else []
    answered(capsys, small_model, path, output, *column)
    answers = labelled(capsys, small_model, "--input", path, *column)
    form = '"label": "{label}", "score": {score}' if target.lower() == ".jsonl" else "{label},{score}"
    form = form.replace(",", "\t") if target == ".tsv" else form
    cells = [form.format(label=answer["label"], score=round(answer["score"], 6)) for answer in answers]
    assert output.read_text(encoding="utf-8") == expected.format(*cells)
    assert list(tmp_path.iterdir()) == [path, output] or list(tmp_path.iterdir()) == [output, path]


def test_a_column_that_is_called_label_is_kept_beside_the_new_one(small_model, capsys, tmp_path):
    """Nothing is lost: it may be the truth that the labels are compared with."""
    path, output = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_text("text,label\na,spam\n")
    answered(capsys, small_model, path, output)
    assert next(csv.DictReader(output.open()))["label"] == "spam"
    assert output.read_text().splitlines()[0] == "text,label,predicted_label,predicted_score"
    path.write_text("text,label,predicted_label\na,spam,ham\n")
    assert predict.main([str(argument) for argument in (small_model, "--input", path, "--output", output)]) == 2
    assert "line 2: there is a field 'predicted_label' already" in capsys.readouterr().err


def test_an_output_is_written_whole_or_not_at_all(small_model, capsys, tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.csv"
    output.write_text("before")
    path.write_text('{"text": "a"}\n{"text": "b", "more": 1}\n')
    command = [small_model, "--input", path, "--output"]
    assert predict.main([str(argument) for argument in (*command, output)]) == 2
    assert "line 2: the first row has no field 'more'; write --output as .jsonl" in capsys.readouterr().err
    assert output.read_text() == "before"
    assert "would overwrite --input" in refused(capsys, *command, path)
    assert "a table is written as .csv, .tsv, .jsonl, .ndjson" in refused(capsys, *command, tmp_path / "labels.xlsx")
    assert "is not a file" in refused(capsys, *command, (tmp_path / "a.csv").mkdir() or tmp_path / "a.csv")
    assert "cannot be written" in refused(capsys, *command, tmp_path / "none" / "out.csv")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.csv", "in.jsonl", "out.csv"]


def test_an_empty_text_gets_an_empty_label_with_a_reason(small_model, capsys, tmp_path):
    """Empty is what the tokenizer finds nothing in."""
    path, output = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_text('id,text\n1,\n2,"  "\n3,\u200b\n4,a word\n', encoding="utf-8")
    answers = labelled(capsys, small_model, "--input", path)
    empty = {"label": "", "score": None, "scores": {}, "reason": "the text is empty"}
    assert answers[:3] == [{"text": text} | empty for text in ("", "  ", "\u200b")]
    assert answers[3]["label"].startswith("LABEL_")
    assert "4 texts in" in (message := answered(capsys, small_model, path, output))
    assert "; 3 without a label: the text is empty" in message
    assert [line.endswith(",,") for line in output.read_text(encoding="utf-8").splitlines()] == [False, True, True, True, False]
    assert predict.main([str(small_model), ""]) == 0
    assert capsys.readouterr().out == "\n  no label: the text is empty\n"


def test_a_text_below_the_threshold_gets_an_empty_label_and_keeps_its_scores(small_model, capsys):
    sure = labelled(capsys, small_model, "--json", "a", "--threshold", 0.2)[0]
    unsure = labelled(capsys, small_model, "--json", "a", "--threshold", 0.9)[0]
    assert unsure == sure | {"label": "", "reason": "the score is below 0.9"}
    assert predict.main([str(small_model), "a", "--threshold", "0.9"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["a", "  no label: the score is below 0.9"]
    for value in ("1.5", "-0.1", "nan"):
        assert f"--threshold is {value}. It must be between 0 and 1" in refused(
            capsys, small_model, "a", f"--threshold={value}"
        )


def test_progress_is_written_where_standard_error_is_a_file(small_model, capsys, tmp_path, monkeypatch):
    """A line after every ten seconds of labelling, and one at the end."""
    seconds = iter(range(0, 10_000, 6))
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    (tmp_path / "in.txt").write_text("a\n" * 6)
    assert predict.main([str(small_model), "--input", str(tmp_path / "in.txt")]) == 0
    lines = capsys.readouterr().err.split("\r")
    assert any(line.startswith("predict: 2 examples") for line in lines)
    assert re.fullmatch(r"6 texts in \d+\.\d s", lines[-1].splitlines()[-1])


def test_a_slow_producer_gets_answers_as_its_texts_come(small_model, tmp_path):
    """And a fast one is read in large parts."""
    reading, writing = os.pipe()
    parts = in_parts(read_rows(Path(f"/dev/fd/{reading}")), wait=False)
    for text in ("one", "two"):
        os.write(writing, f"{text}\n".encode())
        assert [row.text for row in next(parts)] == [text]
    os.write(writing, b"three\nfour\n\xff\n")
    with pytest.raises(UserError, match="line 5: not UTF-8"):
        list(parts)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("wait", [True, False])
def test_a_part_is_bounded_in_texts_and_in_characters(monkeypatch, wait):
    monkeypatch.setattr(inference, "CHUNK", 3)
    monkeypatch.setattr(inference, "CHARACTERS", 10)
    monkeypatch.setattr(inference, "PATIENCE", 60)
    rows = [Row(i, "x" * length, None, {}) for i, length in enumerate([1, 1, 1, 1, 9, 20, 1])]
    assert [len(part) for part in in_parts(rows, wait)] == [3, 2, 1, 1]


def test_answers_leave_as_they_come(small_model, monkeypatch):
    """Not when standard output's buffer is full."""
    reading, writing = os.pipe()
    answers, output = os.pipe()
    with open(output, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        command = [str(small_model), "--input", f"/dev/fd/{reading}"]
        running = threading.Thread(target=predict.main, args=[command], daemon=True)
        running.start()
        for text in ("one", "two"):
            os.write(writing, f"{text}\n".encode())
            assert select.select([answers], [], [], 30)[0]
            assert json.loads(os.read(answers, 10_000))["text"] == text
        os.close(writing)
        running.join(60)
    os.close(reading)
    os.close(answers)


def test_the_columns_of_the_training_are_the_default(small_model, tmp_path, capsys):
    shutil.copytree(small_model, tmp_path / "model")
    (tmp_path / "in.csv").write_text("a,b,text\none,two,three\n")
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "results.json").write_text('{"options": {"text_column": ["a", "b"]}}')
    command = [tmp_path, "--input", tmp_path / "in.csv"]
    assert labelled(capsys, *command)[0]["text"] == "one two"
    assert labelled(capsys, *command, "--text-column", "text")[0]["text"] == "three"
    assert labelled(capsys, tmp_path, "--input", tmp_path / "in.txt")[0]["text"] == "one"
    for damaged in ("5", '{"a": 1}', "[5]", "null"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "results.json").write_text(f'{{"options": {{"text_column": {damaged}}}}}')
        assert predict.text_columns(tmp_path / "other", tmp_path / "in.csv") == []
    command[0] = tmp_path / "model"  # a part of the run
    assert labelled(capsys, *command)[0]["text"] == "one two"


def test_a_table_that_was_written_is_read_again(tmp_path):
    """Whatever is in a cell."""
    cells = ["a\rb", "a\nb", 'a "b"', "a,b;c\td", " a ", "\u2028", "=1+1"]
    with open_table(tmp_path / "out.csv") as table:
        for number, cell in enumerate(cells):
            table.write(None, Row(number, cell, None, {"text": cell, "n": str(number)}), "good", 0.5)
    assert [row.text for row in read_rows(tmp_path / "out.csv")] == cells
