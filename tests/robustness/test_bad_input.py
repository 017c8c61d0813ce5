"""Bad input of every kind is refused in one line that names the place and the remedy, and leaves nothing behind."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import python
from tokenizers import Tokenizer

import train
from common.errors import UserError
from common.files import write_file
from data import evaluation_batches, load_dataset, read_texts, tokenize
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained
from model.pretrained import HEAD
from training.evaluation import ModelRunner, compute_logits

TINY = DistilBertConfig(dim=32, n_heads=4, n_layers=2, hidden_dim=64)
NORM = "distilbert.embeddings.LayerNorm.bias"
TOKEN_TYPE = "distilbert.embeddings.token_type_embeddings.weight"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for the processes that are started here
    monkeypatch.setattr("common.hub.hub_is_reachable", lambda: False)


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory, tokenizer_file):
    """A tiny DistilBERT whose head is for two classes."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    save_pretrained(DistilBertForSequenceClassification(TINY), Tokenizer.from_file(str(tokenizer_file)), folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(classifier_folder):
    """The same without a head."""
    folder = classifier_folder.with_name("base")
    shutil.copytree(classifier_folder, folder)
    write_weights(folder, lambda weights: [weights.pop(key) for key in HEAD])
    return folder


@pytest.fixture
def model(base_folder, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


def write_weights(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def write_tokenizer(folder, change):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def refusal(call, *arguments, **keywords):
    """The message of the UserError that the call must end in, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert message == message.strip()
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return message


# Data sets

GOOD = '{"text": "fine", "label": 0}\n{"text": "also fine", "label": 1}\n'


def data_folder(folder, **files):
    """A folder with these files; train_jsonl is train.jsonl. The test part is a copy of the training part unless given."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        test = path.with_name(path.name.replace("train", "test"))
        if path.name.startswith("train") and test.name.replace(".", "_") not in files:
            shutil.copy(path, test)
    return str(folder)


def data_refusal(folder, **files):
    return refusal(load_dataset, data_folder(folder, **files))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"text": "x", "label": 1, "label": 0}', ["'label' is there twice", "remove one"]),
        ('{"text": "x", "label": 1} {"text": "y", "label": 0}', ["more than one value, at column 26"]),
        ('{"text": "x", "label" 1}', ["':' delimiter at column 23", "one whole object per line"]),
        ('{"text": "x",', ["not JSON", "one whole object per line"]),
        pytest.param("[" * 100_000, ["not JSON"], id="nested too deeply"),
        ('["x", 1]', ["not a JSON object", '{"text": ...}']),
        ('"x"', ["not a JSON object", '{"text": ...}']),
        ('{"text": "x"}', ['"label" is missing', "each row needs one"]),
        ('{"txt": "x", "label": 1}', ['"text" is missing', "each row needs one"]),
        ('{"text": "", "label": 1}', ["the text is empty", "remove the row"]),
        ('{"text": " \\t\\n", "label": 1}', ["the text is empty", "remove the row"]),
        ('{"text": null, "label": 1}', ["the text null is not a string"]),
        ('{"text": ["x"], "label": 1}', ['the text ["x"] is not a string']),
        ('{"text": "x", "label": ""}', ["the label is empty"]),
        ('{"text": "x", "label": true}', ["the label true is neither a whole number nor a name"]),
        ('{"text": "x", "label": 1.0}', ["the label 1.0 is neither a whole number nor a name"]),
        ('{"text": "x", "label": NaN}', ["the label NaN is neither a whole number nor a name"]),
        ('{"text": "x", "label": null}', ["the label null is neither a whole number nor a name"]),
        pytest.param(json.dumps({"text": "x", "label": [1] * 1000}), ["the label [1, 1,", "..."], id="a list of labels"),
        pytest.param('{"text": "x", "label": ' + "9" * 5000 + "}", ["not JSON"], id="5000 digits"),
        ('{"text": "x", "label": "one"}', ["the label 'one' after 0", "use either numbers or names"]),
        ('{"text": "x \\ud800", "label": 1}', ["the text contains half a character", "remove it"]),
        ('{"text": "x", "label": "\\udc00"}', ["the label contains half a character", "remove it"]),
        pytest.param('{"text": "x \ud800", "label": 1}', ["not UTF-8", "save the file as UTF-8"], id="a raw surrogate"),
    ],
)
def test_a_bad_row_of_jsonl_is_refused_with_its_line(tmp_path, row, says):
    message = data_refusal(tmp_path, train_jsonl=GOOD + "\n" + row + "\n" + GOOD)
    assert message.startswith(f"{tmp_path / 'train.jsonl'}, line 4: ")
    assert all(part in message for part in says), message


def test_a_bad_row_in_the_test_part_is_refused_with_its_line(tmp_path):
    message = data_refusal(tmp_path, train_jsonl=GOOD, test_jsonl=GOOD + '{"text": "", "label": 1}\n')
    assert message.startswith(f"{tmp_path / 'test.jsonl'}, line 3: ")


@pytest.mark.parametrize(
    ("rows", "line", "says"),
    [
        ("text,label\nfine,0\none, two,1\n", 3, ["3 fields, but 2 columns", "quotes around each text"]),
        ('text,label\n"two\nlines",0\n\nx,1,2\n', 5, ["3 fields, but 2 columns"]),
        ('text,label\n"two\nlines",0\n"it"s,1\nx,1\n', 4, ["not CSV", "check its quotes"]),
        ('text,label\nfine,0\n"never closed,1\n' + "x,0\n" * 50, 3, ["not CSV", "check its quotes"]),
        ('text,label\n" ",0\n', 2, ["the text is empty"]),
        ("text,label\nfine,0\nx,\n", 3, ["the label is empty"]),
        ("text,label\nfine,good\nx,2\n", 3, ["the label 2 after 'good'"]),
        ("sentence;mood\nfine;0\n", 1, ['no column is called "text"', "'sentence', 'mood'", "--text-column", "--label-column"]),
        ("text,label,label\nfine,0,1\n", 1, ["two columns are called 'label'", "rename one"]),
        ("text,label\nfine,0\nx,1\ntext,label\ny,0\n", 4, ["the header once more", "remove the row"]),
        ("text,LABEL,label\nfine,0,1\n", 1, ["two columns are called 'label'", "rename one"]),
        ('"1","fine","day"\n"2","no description"\n', 2, ["2 fields, but 3 columns", "quotes around each text"]),
        ('"1","fine","day"\n"2",""," "\n', 2, ["the text is empty"]),
    ],
)
def test_a_bad_row_of_csv_is_refused_with_its_first_line(tmp_path, rows, line, says):
    message = data_refusal(tmp_path, train_csv=rows)
    assert message.startswith(f"{tmp_path / 'train.csv'}, line {line}: ")
    assert all(part in message for part in says), message


@pytest.mark.parametrize("before", [0, 1, 5000])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_bytes_that_are_not_utf_8_are_refused_with_their_line(tmp_path, before, suffix):
    header, row, bad = {
        "jsonl": ("", '{"text": "déjà vu", "label": 0}\n', '{"text": "café", "label": 1}\n'),
        "csv": ("text,label\n", '"déjà\nvu",0\n', "café,1\n"),
    }[suffix]
    good = header + row * before
    message = data_refusal(tmp_path, **{f"train_{suffix}": good.encode() + bad.encode("latin-1")})
    assert message.startswith(f"{tmp_path / 'train'}.{suffix}, line {good.count(chr(10)) + 1}: not UTF-8")
    assert "café" in message
    assert message.endswith("save the file as UTF-8")


def test_the_command_that_converts_a_file_is_named_with_an_excerpt_to_judge_by(tmp_path):
    message = data_refusal(tmp_path, train_csv="text;label\nIm Café zu heiß;0\n".encode("cp1252"))
    assert f"line 2: not UTF-8 (if 'Im Café zu heiß;0' reads right: iconv -f WINDOWS-1252 -t UTF-8 {tmp_path}" in message


def test_half_a_file_in_utf_16_is_refused(tmp_path):
    assert "begins as UTF-16, but is not" in data_refusal(tmp_path, train_jsonl=GOOD.encode("utf-16")[:-1])


@pytest.mark.parametrize(
    "files",
    [{"train_jsonl": ""}, {"train_jsonl": "\n\n"}, {"train_csv": ""}, {"train_csv": "text,label\n"}, {"train_csv": "\r\n"}],
)
def test_a_file_without_rows_is_refused_header_or_not(tmp_path, files):
    name = next(iter(files)).replace("_", ".")
    assert data_refusal(tmp_path, **files) == f"{tmp_path / name} has no rows"


def test_a_test_part_without_rows_is_refused(tmp_path):
    assert data_refusal(tmp_path, train_jsonl=GOOD, test_jsonl="") == f"{tmp_path / 'test.jsonl'} has no rows"


@pytest.mark.parametrize(
    ("train_rows", "says"),
    [
        ([(1, None), (1, None)], ["every row has the label 1", "at least two classes"]),
        ([("a", None)], ["every row has the label 'a'", "at least two classes"]),
        ([("a ", None), ("a", None)], ["every row has the label 'a'", "at least two classes"]),
        ([("1", None), (1, None)], ["every row has the label 1", "at least two classes"]),
        ([(0, "A"), (1, "B"), (0, "C")], [", line 3: label 0 is called 'C' here and 'A' before"]),
        ([(0, "A"), (1, "B"), (0, None)], [", line 3: label 0 is called '0' here and 'A' before"]),
        ([(0, "A"), (1, "A")], [", line 2: labels 0 and 1 are both called 'A'", "its own name"]),
        ([(0, "A"), (1, "A ")], [", line 2: labels 0 and 1 are both called 'A'", "its own name"]),
        ([(i, None) for i in range(9)], ["9 of 9 rows have a label that no other row has (text from text, label from label)"]),
    ],
)
def test_labels_that_do_not_form_classes_are_refused(tmp_path, train_rows, says):
    rows = [{"text": "x", "label": label} | ({"label_text": text} if text else {}) for label, text in train_rows]
    message = data_refusal(tmp_path, train_jsonl="".join(json.dumps(row) + "\n" for row in rows))
    assert message.startswith(str(tmp_path / "train.jsonl"))
    assert all(part in message for part in says), message


@pytest.mark.parametrize("label", [2, -1, "one"])
def test_a_label_that_only_the_test_part_has_is_refused(tmp_path, label):
    """With its line and the labels that are known."""
    test = GOOD + json.dumps({"text": "x", "label": label}) + "\n"
    message = data_refusal(tmp_path, train_jsonl=GOOD, test_jsonl=test)
    assert message == f"{tmp_path / 'test.jsonl'}, line 3: label {label!r} is not in the training part, which has 0, 1"


def test_texts_in_place_of_labels_are_shown_in_one_short_line(tmp_path):
    rows = [{"text": "x", "label": f"A whole article\nof many words, number {i}. " * 50} for i in [*range(20), *range(20)]]
    test = [{"text": "x", "label": "a line\nand another" * 100}]
    files = {f"{part}_jsonl": "".join(json.dumps(row) + "\n" for row in r) for part, r in [("train", rows), ("test", test)]}
    assert "test.jsonl, line 1" in data_refusal(tmp_path, **files)


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ("A\nB\n", "train.csv, line 3: label 3 does not fit the 2 classes in classes.txt; number them from 1 to 2"),
        ("A\nB\nA\n", "classes.txt lists 'A' twice"),
        (b"A\n\xe9\nC\n", "classes.txt, line 2: not UTF-8"),
    ],
)
def test_a_classes_txt_that_does_not_name_the_classes_is_refused(tmp_path, classes, says):
    message = data_refusal(tmp_path, train_csv="1,x,y\n2,x,y\n3,x,y\n", classes_txt=classes)
    assert message.startswith(f"{tmp_path}{os.sep}{says}")


def test_classes_txt_does_not_hide_that_there_is_only_one_class(tmp_path):
    assert "at least two classes" in data_refusal(tmp_path, train_csv="1,x,y\n1,z,y\n", classes_txt="A\nB\n")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train_jsonl": GOOD, "train_csv": "text,label\nx,0\ny,1\n"}, "contains both train.csv and train.jsonl: move one"),
        ({"notes_md": "", "tickets_csv": "text,label\n"}, "contains no train.csv, .tsv or .jsonl, but notes.md, tickets.csv: "),
        ({"test_jsonl": GOOD}, "contains no train.csv, .tsv or .jsonl, but test.jsonl: rename one of its files"),
        ({}, "contains no train.csv, .tsv or .jsonl, but nothing: "),
    ],
)
def test_a_folder_with_two_training_parts_or_none_is_refused_with_what_it_contains(tmp_path, files, says):
    assert data_refusal(tmp_path, **files).startswith(f"{tmp_path} {says}")


def test_a_test_part_without_labels_is_refused_with_the_remedy(tmp_path):
    """As that of GLUE, or of a competition."""
    message = data_refusal(tmp_path, train_tsv="text\tlabel\nx\t0\ny\t1\n", test_tsv="id\ttext\tlength\n0\tx\t1\n")
    assert message.startswith(
        f"{tmp_path / 'test.tsv'}, line 1: no column is called \"label\"; there are 'id', 'text', 'length'"
    )
    assert message.endswith(f"Or test on a share of the training part: --dataset {tmp_path / 'train.tsv'}")


def test_a_file_of_another_kind_is_refused_by_its_suffix(tmp_path):
    for name in ("tickets.xlsx", "tickets.parquet", "tickets.csv.gz"):
        (tmp_path / name).write_bytes(b"PK")
        suffix = name[name.rindex(".") :]
        for call in (load_dataset, lambda path: list(read_texts(Path(path)))):
            message = refusal(call, str(tmp_path / name))
            assert message == f"{tmp_path / name}: a {suffix} file is not read; save it as .csv, .tsv, .jsonl or .json"


def test_a_json_array_is_refused_with_the_line_of_the_object(tmp_path):
    objects = '[\n {"text": "x", "label": 0},\n {"text": "y", "label": 1}%s'
    for end, says in {
        ',\n {"text": "z"}\n]': 'line 4: "label" is missing',
        ',\n {"text": "z" "label": 1}]': "line 4: not JSON (Expecting ',' delimiter at column 15)",
        '\n {"text": "z", "label": 1}]': "line 3: not JSON (after this object there is neither a comma nor the end)",
        "": "line 3: not JSON (after this object there is neither a comma nor the end)",
        "] 1": "line 3: not JSON (after this object there is neither a comma nor the end)",
        ",\n 7]": "line 4: not a JSON object",
        ',\n {"text": "z", "label": 1, "text": ""}]': "line 4: 'text' is there twice",
    }.items():
        assert says in data_refusal(tmp_path, train_json=objects % end)
    assert "has no rows" in data_refusal(tmp_path, train_json="[ ]\n")


def test_a_folder_for_each_class_is_checked_as_a_table_is(tmp_path):
    (tmp_path / "train").mkdir()
    assert "no folder for each class with .txt files" in refusal(load_dataset, str(tmp_path))
    for name, text in {"neg": "bad", "pos": " \n"}.items():
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / name / "0.txt").write_text(text)
    message = refusal(load_dataset, str(tmp_path))
    assert message == f"{tmp_path / 'train' / 'pos' / '0.txt'}, line 1: the text is empty; fill it in or remove the row"


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "train.jsonl").mkdir()
    (tmp_path / "test.jsonl").mkdir()
    assert refusal(load_dataset, str(tmp_path)).startswith(f"{tmp_path / 'train.jsonl'} is not a regular file")


@pytest.mark.parametrize(
    "name", ["agnews", "no/such/folder", "no/tickets.csv", "two\nlines", pytest.param("x" * 300, id="long")]
)
def test_an_unknown_data_set_is_refused_with_the_known_names(name):
    message = refusal(load_dataset, name)
    assert (
        message.removesuffix(". Did you mean ag_news?")
        == f"there is no data set {name!r}: name a file, a folder, user/name on the hub, or one of ag_news and sample"
    )


# Models


def model_refusal(folder, num_labels=2):
    return refusal(load_pretrained, str(folder), num_labels)


def test_the_undamaged_models_load(classifier_folder, base_folder):
    for folder, num_labels in [(classifier_folder, 2), (base_folder, 2), (base_folder, 5)]:
        assert load_pretrained(str(folder), num_labels)[0].classifier.out_features == num_labels


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_missing_or_a_folder_is_refused_by_name(model, name):
    (model / name).unlink()
    assert model_refusal(model).startswith(f"{model / name} is missing")
    (model / name).mkdir()
    assert model_refusal(model).startswith(str(model / name))


def test_a_pickle_is_not_read_in_place_of_safetensors(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "safetensors files only" in model_refusal(model)


def test_a_file_in_place_of_a_model_is_refused(model):
    """The message names the files that the folder should contain."""
    message = model_refusal(model / "model.safetensors")
    assert message.endswith("is a file: name the folder that contains config.json, tokenizer.json, model.safetensors")


@pytest.mark.parametrize("fraction", [0, 0.001, 0.01, 0.5, 0.9999])
def test_a_safetensors_file_cut_anywhere_is_refused(model, fraction):
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    assert model_refusal(model).startswith(f"{path} is not a whole safetensors file")


def test_a_pickle_called_safetensors_is_not_unpickled(model):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    weights = safetensors.torch.load_file(model / "model.safetensors")
    buffer = io.BytesIO()
    torch.save(weights | {"trap": Trap()}, buffer)
    (model / "model.safetensors").write_bytes(buffer.getvalue())
    assert model_refusal(model).startswith(f"{model / 'model.safetensors'} is not a whole safetensors file")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({NORM: None}, f"lacks {NORM}: it does not belong to its config.json"),
        ({"foo": torch.zeros(1)}, "contains distilbert.foo, which DistilBERT does not have"),
        ({NORM: torch.zeros(33)}, f"{NORM} has the shape (33,), but config.json says (32,)"),
        ({NORM: torch.tensor(1.0)}, f"{NORM} has the shape (), but config.json says (32,)"),
        ({NORM: torch.zeros(32, dtype=torch.int64)}, f"{NORM} is torch.int64, not floating point"),
        ({NORM: torch.full((32,), torch.nan)}, f"{NORM} contains NaN or infinity"),
        ({TOKEN_TYPE: torch.zeros(2, 33)}, f"{TOKEN_TYPE} has the shape (2, 33), but config.json says (2, 32)"),
        ({TOKEN_TYPE: torch.zeros(2, 1)}, f"{TOKEN_TYPE} has the shape (2, 1), but config.json says (2, 32)"),
        ({TOKEN_TYPE: torch.zeros(0, 32)}, f"{TOKEN_TYPE} has the shape (0, 32), but config.json says (1, 32)"),
        ({TOKEN_TYPE: torch.tensor(1.0)}, f"{TOKEN_TYPE} has the shape (), but config.json says (1, 32)"),
        ({"pre_classifier.bias": torch.zeros(32)}, "lacks pre_classifier.weight, classifier.weight, classifier.bias"),
    ],
)
def test_weights_that_contradict_the_configuration_are_refused(model, changes, says):
    def change(weights):
        for key, tensor in changes.items():
            weights.pop(key, None)
            if tensor is not None:
                weights[key] = tensor

    write_weights(model, change)
    message = model_refusal(model)
    assert message.startswith(str(model / "model.safetensors"))
    assert says in message


def test_a_head_for_another_number_of_classes_is_refused(classifier_folder):
    """With both numbers and the remedy."""
    message = model_refusal(classifier_folder, num_labels=4)
    assert message.endswith("model.safetensors has a head for 2 classes, but 4 are needed: use the base model")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; only DistilBERT and BERT are supported"),
        ({"model_type": ["bert"]}, "model_type is ['bert']"),
        ({"n_heads": 5}, "dim 32 is not divisible by n_heads 5"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu' is supported"),
        ({"activation": "relu"}, "activation is 'relu'; only 'gelu' is supported"),
        ({"is_decoder": True}, "is_decoder is True; only False is supported"),
        ({"dim": "32"}, "dim is '32'"),
        ({"dim": 32.0}, "dim is 32.0; it must be a whole number, at least 1 and below 1048576"),
        ({"dim": 10**30}, f"dim is {10**30}"),
        ({"hidden_dim": 1 << 62}, f"hidden_dim is {1 << 62}"),
        ({"n_layers": True}, "n_layers is True"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be a number, at least 0 and below 1"),
        ({"attention_dropout": float("nan")}, "attention_dropout is nan"),
        ({"pad_token_id": None}, "pad_token_id is None"),
        ({"pad_token_id": 30522}, "pad_token_id 30522 is outside the vocabulary of 30522 words"),
    ],
)
def test_a_configuration_of_an_unsupported_model_is_refused(model, changes, says):
    write_config(model, **changes)
    message = model_refusal(model)
    assert message.startswith(f"{model / 'config.json'}: ")
    assert says in message


@pytest.mark.parametrize(
    "content", [b"", b"{nope", pytest.param(b"[" * 100_000, id="deep"), b'{"dim": "\xe9"}', b"[1, 2]", b"null"]
)
def test_a_configuration_that_is_not_a_json_object_is_refused(model, content):
    (model / "config.json").write_bytes(content)
    assert model_refusal(model).startswith(str(model / "config.json"))


@pytest.mark.parametrize("content", ["", "garbage", "{}", "null", '{"version": "1.0", "model": {"type": "Foo"}}'])
def test_a_tokenizer_that_is_garbage_is_refused(model, content):
    (model / "tokenizer.json").write_text(content)
    message = model_refusal(model)
    assert message.startswith(f"{model / 'tokenizer.json'} is not a tokenizer")
    assert message.endswith("download it again")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda it: it["model"]["vocab"].update({"the": 40_000}), "has 40001 words, but the model has 30522"),
        (lambda it: it["model"]["vocab"].update({"brandnew": 30_522}), "has 30523 words, but the model has 30522"),
        (lambda it: it["model"].update(unk_token="no such word"), "Missing [UNK] token"),
        (lambda it: it.update(post_processor=None), "does not put a text between [CLS] and [SEP]"),
    ],
    ids=["a word far beyond", "a word too many", "no unknown word", "no special tokens"],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(model, change, says):
    write_tokenizer(model, change)
    message = model_refusal(model)
    assert message.startswith(str(model / "tokenizer.json"))
    assert says in message


def test_a_name_that_is_too_long_is_refused():
    assert "neither as a folder here nor on" in model_refusal("x" * 300)


# The command line


def run_refusal(capsys, tmp_path, *arguments, model="minilm", dataset="sample"):
    """What train.py prints when it refuses to run; it must print one line, return 2 and leave no folder."""
    before = sorted(path for path in tmp_path.rglob("*"))
    typed = ["--model", str(model), "--dataset", str(dataset), "--output-dir", str(tmp_path / "out")]
    assert train.main([*typed, *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("train.py: ")
    assert printed.endswith("\n")
    assert len(printed.splitlines()) == 1
    assert sorted(path for path in tmp_path.rglob("*")) == before
    return printed.removeprefix("train.py: ").rstrip("\n")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--r 0", ["r is 0", "at least 1"]),
        ("--r 2.5", ["--r", "'2.5'", "--help"]),
        ("--lora-alpha 0", ["lora_alpha is 0.0"]),
        ("--lora-alpha nan", ["lora_alpha is nan"]),
        ("--lora-dropout 1.5", ["lora_dropout is 1.5", "below 1"]),
        ("--bias foo", ["bias is 'foo'", "none, all, lora_only"]),
        ("--epochs 0", ["--epochs is 0", "between 1 and"]),
        pytest.param("--epochs 1" + "0" * 400, ["--epochs is 1000", "between 1 and 2,147,483,647"], id="--epochs 1e400"),
        pytest.param(
            "--batch-size 1" + "0" * 400, ["--batch-size is 1000", "between 1 and 2,147,483,647"], id="--batch-size 1e400"
        ),
        ("--merged-output caf\udce9", ["'caf\\udce9' on the command line is not UTF-8"]),
        ("--batch-size -1", ["--batch-size is -1", "between 1 and"]),
        ("--text-column a b --label-column b", ["--text-column and --label-column are both b"]),
        ("--test-share 1", ["--test-share is 1.0", "between 0.001 and 0.9"]),
        ("--train-limit 0", ["--train-limit is 0"]),
        ("--test-limit 0", ["--test-limit is 0"]),
        ("--max-length 2", ["--max-length is 2", "between 3 and"]),
        ("--seed -1", ["--seed is -1"]),
        ("--seed 18446744073709551616", ["--seed is 18446744073709551616", "between 0 and 9,223,372,036,854,775,807"]),
        ("--learning-rate -0.001", ["--learning-rate is -0.001", "between 1e-30 and 1e+30"]),
        ("--learning-rate nan", ["--learning-rate is nan"]),
        ("--learning-rate inf", ["--learning-rate is inf"]),
        ("--learning-rate 1e300", ["--learning-rate is 1e+300", "between 1e-30 and 1e+30"]),
        ("--weight-decay -1", ["--weight-decay is -1.0"]),
        ("--weight-decay nan", ["--weight-decay is nan"]),
        ("--warmup 1.1", ["--warmup is 1.1", "between 0 and 1"]),
        ("--dtype float64", ["--dtype is 'float64'", "auto, float32, bfloat16"]),
        ("--device gpu", ["--device is 'gpu'", "auto, cpu, cuda, mps"]),
        ("--no-such-option 1", ["--no-such-option", "--help"]),
        ("--epoch 1", ["--epoch", "--help"]),
        ("--r", ["--r", "expected one argument", "--help"]),
        ("--target-modules", ["--target-modules", "expected at least one argument", "--help"]),
        ("sample", ["unrecognized arguments: sample", "--help"]),
    ],
)
def test_an_invalid_option_is_refused_by_name(capsys, tmp_path, typed, says):
    message = run_refusal(capsys, tmp_path, *typed.split())
    assert all(part in message for part in says), message


def test_a_newline_in_what_was_typed_does_not_break_the_message(capsys, tmp_path):
    assert "two lines" in run_refusal(capsys, tmp_path, "two\nlines")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_refused_with_the_remedy(capsys, tmp_path):
    message = run_refusal(capsys, tmp_path, "--device", "cuda")
    assert message == "--device is cuda, but PyTorch finds none on this machine. Leave the option out, or use cpu"


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_lin", "query"], ["no layer is named 'query'", "q_lin, k_lin, v_lin, out_lin, lin1, lin2"]),
        ([".*query"], ["Target modules '.*query' not found in the base model", "q_lin, k_lin, v_lin, out_lin, lin1, lin2"]),
        ([""], ["Please specify `target_modules`, which is empty", "q_lin, k_lin, v_lin, out_lin, lin1, lin2"]),
        (["*q_lin"], ["'*q_lin' is not a valid regular expression", "position 0"]),
        (["classifier"], ["All modules were excluded, or are part of modules_to_save (the trained head)"]),
        (["word_embeddings"], ["word_embeddings is of type Embedding", "Only plain linear layers"]),
        (["attention"], ["attention is of type MultiHeadSelfAttention", "Only plain linear layers"]),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(capsys, tmp_path, base_folder, targets, says):
    message = run_refusal(capsys, tmp_path, "--target-modules", *targets, model=base_folder)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--max-length", "513"], "--max-length is 513, but {} reads at most 512 tokens"),
        (["--r", "33"], "--r is 33, but the weights of {} have rank 32 at most"),
    ],
)
def test_an_option_beyond_the_models_limit_is_refused(capsys, tmp_path, base_folder, typed, says):
    """The message names the limit."""
    assert run_refusal(capsys, tmp_path, *typed, model=base_folder) == says.format(base_folder)


def test_errors_in_data_or_model_reach_the_command_line(capsys, tmp_path, classifier_folder):
    data = data_folder(tmp_path / "data", train_jsonl=GOOD + "[]\n")
    assert run_refusal(capsys, tmp_path, dataset=data).startswith(f"{Path(data, 'train.jsonl')}, line 3: ")
    assert "has a head for 2 classes, but 4 are needed" in run_refusal(capsys, tmp_path, model=classifier_folder)
    assert run_refusal(capsys, tmp_path, dataset="agnews").startswith("there is no data set 'agnews'")


def test_a_model_that_cannot_be_found_is_refused_by_name(capsys, tmp_path):
    """With the remedy."""
    message = run_refusal(capsys, tmp_path, model="no-one/no-such-model")
    assert "no-one/no-such-model" in message
    assert "name a folder" in message


@pytest.mark.parametrize("option", ["--model", "--dataset"])
def test_an_empty_name_is_refused_and_not_taken_for_the_default(capsys, tmp_path, monkeypatch, option):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    message = run_refusal(capsys, tmp_path, option, "")
    assert "distilbert-base-uncased" not in message
    assert "ag_news" not in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file", "exists and is not an empty folder: name another folder, or move it away"),
        ("full", "exists and is not an empty folder: name another folder, or move it away"),
        ("file/below", "cannot be written: Not a directory"),
        pytest.param("x" * 300, "cannot be written: File name too long", id="long"),
    ],
)
def test_an_output_folder_that_is_taken_is_refused_and_kept(capsys, tmp_path, base_folder, name, says):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("precious")
    message = run_refusal(capsys, tmp_path, "--output-dir", str(tmp_path / name), model=base_folder)
    assert str(tmp_path / name) in message
    assert says in message
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "results.json").read_text() == "precious"


def test_a_file_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(write_file, tmp_path / "file" / "results.json", b"{}")
    assert message.startswith(f"{tmp_path / 'file' / 'results.json'} cannot be written")


def test_a_model_that_has_diverged_is_not_scored(base_folder, tokenizer_file):
    model, tokenizer = load_pretrained(str(base_folder), 2)
    texts = tokenize(tokenizer, ["one", "two"], 16)
    runner = ModelRunner(model, torch.device("cpu"), torch.float32)
    batches = evaluation_batches(texts.lengths, runner.tokens)
    assert compute_logits(runner, texts, batches).shape == (2, 2)
    model.classifier.bias.data[0] = torch.inf
    assert "smaller --learning-rate" in refusal(compute_logits, runner, texts, batches)


def process(*arguments, **environment):
    return python("train.py", *arguments, env=os.environ | environment)


def test_a_refused_process_ends_with_status_2_and_one_line(tmp_path):
    data = data_folder(tmp_path / "data", train_csv='text,label\nx,0\n"never closed,1\n')
    ended = process("--model", "minilm", "--dataset", data, "--output-dir", tmp_path / "out")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"train.py: {Path(data, 'train.csv')}, line 3: ")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_console_that_cannot_show_a_name_ends_no_run(tmp_path, base_folder):
    data = data_folder(tmp_path / "data", train_jsonl='{"text": "x", "label": "thé"}\n{"text": "y", "label": "café"}\n')
    options = ["--model", base_folder, "--dataset", data, "--output-dir", tmp_path / "out", "--epochs", 1]
    ended = process(*options, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended.stderr
    assert "caf\\xe9" in ended.stdout
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["after"]["per_class_f1"]) == ["café", "thé"]
