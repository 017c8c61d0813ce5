"""What belongs to a run, an adapter or a model reaches the labels: length, capitals, names, and how scores are computed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from helpers import adapted
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC, BertNormalizer, Lowercase, Sequence

import predict
import train
from common.errors import HubUnreachable, NotOnHub, UserError
from model import DistilBertConfig, load_pretrained, read_max_length, read_tokenizer, write_tokenizer
from training.inference import load_classifier, probabilities

TEXT = "Caf\u00e9 \u4e2d\u6587 HELLO World"


def change_json(path: Path, **values: Any) -> None:
    """Set values in a JSON file; None deletes one."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (old | values).items() if value is not None}))


@pytest.fixture
def model(small_model, tmp_path) -> Path:
    """A whole model with four classes, to be changed."""
    return Path(shutil.copytree(small_model, tmp_path / "whole"))


@pytest.fixture
def adapter(small_model, tmp_path) -> Path:
    """An adapter as peft leaves it, without tokenizer and names, on a base model of its own."""
    base = Path(shutil.copytree(small_model, tmp_path / "base"))
    model = adapted(load_pretrained(str(base), 4)[0], base_model_name_or_path=str(base))
    model.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_classifier(folder, device="cpu", **options)
    return str(caught.value)


# The maximum length


@pytest.fixture(scope="module")
def short_run(small_model, tmp_path_factory) -> Path:
    """A run in which only what comes after the eighth token tells the classes apart, and the model reads up to there."""
    folder = tmp_path_factory.mktemp("short")
    for part in ("train", "test"):
        rows = [(f"{word} one two three four five {other}", word) for word, other in [("good", "bad"), ("bad", "good")]]
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows * 4]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    run = folder / "run"
    typed = ["--model", small_model, "--dataset", folder, "--max-length", 8, "--output-dir", run, "--epochs", 1]
    base = folder / "base"
    weights = shutil.copytree(small_model, base) / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({key: value for key, value in tensors.items() if "classifier" not in key}, weights)
    typed[1] = base
    typed += ["--quiet", "--device", "cpu", "--merged-output", folder / "merged"]
    assert train.main([str(argument) for argument in typed]) == 0
    return run


def test_the_length_of_the_training_is_the_default_of_everything_that_reads_the_result(short_run):
    """Here and in transformers, for the adapter and the merged model."""
    for folder in (short_run, short_run / "adapter", short_run.parent / "merged"):
        assert load_classifier(folder, device="cpu").max_length == 8
    assert load_classifier(short_run, device="cpu", max_length=11).max_length == 11
    for folder in (short_run / "adapter", short_run.parent / "merged"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert len(theirs("word " * 20, truncation=True)["input_ids"]) == 8


def test_peft_reads_an_adapter_beside_its_tokenizer(short_run):
    import peft

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(short_run.parent / "base", num_labels=2)
    theirs = peft.PeftModel.from_pretrained(theirs, short_run / "adapter").eval()
    ours = load_classifier(short_run, device="cpu").runner.model
    ids = torch.tensor([[101, 2204, 2028, 102]])
    torch.testing.assert_close(ours.float()(ids), theirs(input_ids=ids).logits, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("config", "truncation", "length"),
    [
        ({"model_max_length": 9}, None, 9),
        ({"model_max_length": 512}, 7, 7),
        ({"model_max_length": 10**30}, None, 512),
        ({}, 5, 5),
        (None, None, 512),
    ],
)
def test_the_length_of_a_foreign_adapter_comes_from_its_tokenizer_files(adapter, small_model, config, truncation, length):
    tokenizer = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    tokenizer.no_truncation()
    if truncation:
        tokenizer.enable_truncation(truncation)
    if config is not None:
        tokenizer.save(str(adapter / "tokenizer.json"))
        change_json(adapter / "tokenizer_config.json", **config)
    assert load_classifier(adapter, device="cpu").max_length == length


def test_a_length_that_cannot_be_is_refused_with_its_file(tmp_path):
    for length in (2, -1, "8", True, [8]):
        change_json(tmp_path / "tokenizer_config.json", model_max_length=length)
        with pytest.raises(UserError, match=r"tokenizer_config.json: the maximum length is .*It must be a number above 2"):
            read_max_length(tmp_path)


# The tokenizer


@pytest.fixture
def small_tokenizer(tokenizer_file) -> Tokenizer:
    """BERT's, with few words: transformers takes long to load many."""
    contents = json.loads(tokenizer_file.read_text())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyzHW\u00e9\u4e2d\u6587"]
    contents["model"]["vocab"] = {word: i for i, word in enumerate([*words, *(f"##{word}" for word in words[5:])])}
    for i, token in enumerate(contents["added_tokens"]):
        token["id"] = contents["model"]["vocab"][token["content"]] if token["content"] in words else i
    for name, token in contents["post_processor"]["special_tokens"].items():
        token["ids"] = [contents["model"]["vocab"][name]]
    return Tokenizer.from_str(json.dumps(contents | {"truncation": None, "padding": None}))


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strip_accents": False},
        {"do_lower_case": False},
        {"do_lower_case": True},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
        {"do_lower_case": True, "tokenizer_class": "PreTrainedTokenizerFast"},
        {"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"},
    ],
)
def test_tokenizer_config_changes_the_tokens_as_in_transformers(small_tokenizer, tmp_path, lowercase, options):
    small_tokenizer.normalizer.lowercase = lowercase
    small_tokenizer.save(str(tmp_path / "tokenizer.json"))
    change_json(tmp_path / "tokenizer_config.json", **{"tokenizer_class": "DistilBertTokenizer"} | options)
    ours = read_tokenizer(tmp_path / "tokenizer.json", DistilBertConfig()).encode(TEXT).ids
    assert ours == transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]


@pytest.mark.parametrize("normalizer", [BertNormalizer(lowercase=False, strip_accents=True), Sequence([NFC(), Lowercase()])])
def test_a_saved_tokenizer_gives_the_same_tokens_in_transformers(small_tokenizer, tmp_path, normalizer):
    """Also one that keeps capitals, or that is not BERT's own."""
    small_tokenizer.normalizer = normalizer
    write_tokenizer(small_tokenizer, 9, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = read_tokenizer(tmp_path / "tokenizer.json", DistilBertConfig())
    assert small_tokenizer.encode(TEXT).ids == theirs(TEXT)["input_ids"] == again.encode(TEXT).ids
    assert theirs(["a", "b c"], padding=True)["input_ids"][0][-1] == 0


def test_a_tokenizer_that_contradicts_its_configuration_is_refused(model):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.normalizer = Lowercase()
    tokenizer.save(str(model / "tokenizer.json"))
    path = model / "tokenizer_config.json"
    change_json(path, tokenizer_class="BertTokenizer", do_lower_case=True)
    load_pretrained(str(model), 4)
    for values, says in [
        ({"do_lower_case": False}, "do_lower_case is False, but tokenizer.json does otherwise"),
        ({"do_lower_case": "no"}, "do_lower_case is 'no'; it must be true or false"),
        ({"truncation_side": "left"}, "truncation_side is 'left'; only 'right' is supported"),
    ]:
        change_json(path, **values)
        assert refusal(model).startswith(f"{path}: {says}")


def test_a_folder_with_a_model_is_that_model_whatever_else_it_holds(model, adapter):
    """peft saves a second adapter in a folder of the first, which may be called "model" or "adapter"."""
    for folder in (model, adapter):
        (folder / "model").mkdir()
        assert len(load_classifier(folder, device="cpu").label_names) == 4


def test_an_adapter_is_read_with_its_own_tokenizer(adapter, small_model):
    tokenizer = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    tokenizer.normalizer.lowercase = False
    tokenizer.no_padding()
    tokenizer.save(str(adapter / "tokenizer.json"))
    assert load_classifier(adapter, device="cpu").tokenizer.encode("HELLO").ids == tokenizer.encode("HELLO").ids


# The classes and their scores


@pytest.mark.parametrize("problem_type", [None, "single_label_classification", "multi_label_classification"])
def test_scores_are_those_of_the_pipeline_of_transformers(model, adapter, problem_type):
    """Of a whole model, and of a foreign adapter, whose base model says the same."""
    for folder, says in ((model, model), (adapter, adapter.parent / "base")):
        change_json(says / "config.json", problem_type=problem_type)
        classifier = load_classifier(folder, device="cpu")
        answer = next(classifier.label(["A text"]))
        logits = classifier.runner.model(torch.tensor([classifier.tokenizer.encode("A text").ids])).float().detach()
        many = problem_type == "multi_label_classification"
        expected = logits[0].sigmoid() if many else logits[0].softmax(0)
        assert list(answer["scores"].values()) == pytest.approx(expected.tolist(), abs=1e-3)
    theirs = transformers.pipeline("text-classification", model=str(model), top_k=None)(["A text"])[0]
    answer = next(load_classifier(model, device="cpu").label(["A text"]))
    assert answer["scores"] == pytest.approx({each["label"]: each["score"] for each in theirs}, abs=5e-3)


def test_the_sigmoid_takes_any_logit():
    logits = torch.tensor([[-1e4, -3.0, 0.0, 3.0, 1e4]])
    assert probabilities(logits.numpy(), True) == pytest.approx(logits.sigmoid().numpy(), abs=1e-7)


def test_an_adapter_trained_here_has_one_class_per_text_whatever_its_base_was(short_run):
    config = short_run.parent / "base" / "config.json"
    before = config.read_text()
    change_json(config, problem_type="multi_label_classification")
    answer = next(load_classifier(short_run, device="cpu").label(["good"]))
    config.write_text(before)
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-6)
    assert list(answer["scores"]) == ["bad", "good"]


def test_a_model_of_numbers_is_refused(model):
    change_json(model / "config.json", problem_type="regression")
    assert "problem_type 'regression': it has no classes" in refusal(model)


def test_one_class_is_scored_by_the_sigmoid_as_in_transformers(model):
    weights = safetensors.torch.load_file(model / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][:1].clone()
    safetensors.torch.save_file(weights, model / "model.safetensors")
    change_json(model / "config.json", id2label={"0": "relevant"}, label2id=None)
    theirs = transformers.pipeline("text-classification", model=str(model))("A text")[0]
    answer = next(load_classifier(model, device="cpu").label(["A text"]))
    assert (answer["label"], answer["score"]) == ("relevant", pytest.approx(theirs["score"], abs=5e-3))
    assert answer["score"] < 0.9


def test_names_that_transformers_leaves_out_are_its_default_names(tmp_path, tokenizer_file):
    config = transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert load_classifier(tmp_path, device="cpu").label_names == ["LABEL_0", "LABEL_1"]


def test_a_base_model_has_no_classes_even_if_its_config_names_some(model):
    """Otherwise a random head would label."""
    weights = safetensors.torch.load_file(model / "model.safetensors")
    base = {key: value for key, value in weights.items() if key.startswith("distilbert.")}
    safetensors.torch.save_file(base, model / "model.safetensors")
    assert "has no classifier, so this is a base model" in refusal(model)


@pytest.mark.parametrize(
    ("id2label", "says"),
    [
        ({"0": "a", "1": "b"}, "names 2 classes, but the head is for 4"),
        ({"0": "a", "1": "b", "2": "c", "3": "a"}, "two classes the same name"),
        ({"1": "a", "2": "b", "3": "c", "4": "d"}, "must name the classes 0, 1, 2"),
        ([], "must name the classes 0, 1, 2"),
    ],
)
def test_names_that_do_not_fit_are_refused(model, id2label, says):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": id2label}))
    message = refusal(model)
    assert message.startswith(str(path))
    assert says in message


def test_the_names_of_a_foreign_adapter_are_those_of_its_base_model(adapter):
    names = {"0": "red", "1": "green", "2": "blue", "3": "black"}
    change_json(adapter.parent / "base" / "config.json", id2label=names)
    assert load_classifier(adapter, device="cpu").label_names == list(names.values())
    (adapter / "label_names.json").write_text('["a", "b", "c", "c"]')
    assert "must list 4 different names" in refusal(adapter)


# Models and adapters of other kinds


def bert(folder: Path, kind: Any, tokenizer_file: Path) -> Path:
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    kind(config).save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    return folder


def test_the_head_of_another_kind_is_named(tmp_path, tokenizer_file):
    whole = bert(tmp_path / "classifier", transformers.BertForSequenceClassification, tokenizer_file)
    assert "has BERT's classifier, which reads the pooler: only DistilBERT's head is supported" in refusal(whole)
    with pytest.raises(UserError, match="BERT's classifier, which reads the pooler"):
        load_pretrained(str(whole), 2)
    tokens = bert(tmp_path / "tokens", transformers.BertForTokenClassification, tokenizer_file)
    assert "has another kind of classifier: only DistilBERT's head is supported" in refusal(tokens)


@pytest.mark.parametrize(
    ("kind", "target", "says"),
    [
        ("Bert", "value", "its base is a BERT, with bert.encoder.layer.0.attention.self.value.lora_A.weight"),
        ("Roberta", "value", "its base is a RoBERTa, with roberta.encoder"),
        ("XLNet", "o", "its base is another kind of model, with"),
    ],
)
def test_an_adapter_of_another_kind_of_model_is_refused_for_that(tmp_path, kind, target, says):
    import peft

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
    if kind == "XLNet":
        shape = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 64, "vocab_size": 99}
    config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    targets = ["layer_1"] if kind == "XLNet" else [target]
    peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets)).save_pretrained(tmp_path)
    message = refusal(tmp_path, model="no/matter")
    assert message.startswith(f"{tmp_path}: {says}")
    assert "Only adapters of DistilBERT are supported" in message


@pytest.mark.parametrize("name", ["/mnt/drive/base", "D:\\models\\base", "~/models/base", "models/base", "base"])
@pytest.mark.parametrize("reachable", [True, False])
def test_a_base_model_of_another_machine_is_named_with_the_file_that_names_it(adapter, name, reachable, monkeypatch):
    def no_hub(repo_id: str, *arguments: Any) -> Path:
        raise (NotOnHub if reachable else HubUnreachable)("check the spelling")

    monkeypatch.setattr("common.hub.hub_file", no_hub)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=name)
    message = refusal(adapter)
    assert message.startswith(f"{adapter / 'adapter_config.json'} names the base model {name!r}, which is not a folder here")
    assert message.endswith("Pass the base model with --model")
    assert "spelling" not in message
    assert refusal(adapter, model=name).startswith("check the spelling")  # of what the user typed


# The weights


def test_weights_that_were_replaced_after_the_training_are_refused(short_run, capsys):
    path = short_run.parent / "base" / "model.safetensors"
    before = path.read_bytes()
    weights = safetensors.torch.load(before)
    weights["distilbert.embeddings.LayerNorm.bias"] += 0.5
    path.write_bytes(safetensors.torch.save(weights))
    try:
        assert predict.main([str(short_run), "good"]) == 2
        assert (
            f"{path.parent} is not what {short_run} was trained on: the sha256 of its weights differs"
            in capsys.readouterr().err
        )
        assert "is not what" in refusal(short_run / "adapter")
        assert predict.main([str(short_run), "good", "--model", str(path.parent)]) == 0  # the user's own choice
        captured = capsys.readouterr()
        assert captured.err.count("is not what") == 1
        assert "good" in captured.out
    finally:
        path.write_bytes(before)
    assert predict.main([str(short_run), "good"]) == 0
    assert capsys.readouterr().err == ""
