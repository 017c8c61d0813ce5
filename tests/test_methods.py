"""LoRA, a trained head and full fine-tuning: what each trains, saves and reports."""

import ast
import json
import re
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from processes import python
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

import compare
import predict
import report
import train
from common.files import read_json
from data import load_dataset, tokenize
from lora import LoraConfig, LoRALinear, get_peft_model
from model import load_pretrained
from training.artifacts import EVENTS
from training.evaluation import Examples, ModelRunner
from training.inference import load_classifier
from training.model_card import model_card
from training.options import LEARNING_RATES, LORA_OPTIONS, Options
from training.sanity_checks import frozen_sha256, lora_checks

SHORT = ["--dataset", "sample", "--train-limit", "96", "--test-limit", "48", "--epochs", "1"]
DIM, LAYERS = 32, 2  # of the small model
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_model) -> Path:
    """A short run of each method."""
    folder = tmp_path_factory.mktemp("methods")
    for method in LEARNING_RATES:
        options = ["--model", str(small_model), "--method", method, "--tensorboard", "--output-dir", str(folder / method)]
        assert train.main([*SHORT, *options]) == 0
    return folder


def runner_of(config: LoraConfig | None) -> tuple[ModelRunner, Examples]:
    torch.manual_seed(0)
    base, tokenizer = load_pretrained("minilm", 2)
    model = base if config is None else get_peft_model(base, config)
    texts = tokenize(tokenizer, ["one text", "another, longer text", "a third"], 32)
    return ModelRunner(model, CPU, torch.float32), Examples(texts, np.array([0, 1, 0]))


QV = LoraConfig(r=2, target_modules=["q_lin", "v_lin"])


def test_the_sanity_checks_pass_and_leave_no_gradient():
    runner, data = runner_of(QV)
    assert lora_checks(runner, data) == [
        "injection changed the logits by 0.0",
        "gradients reach exactly the 28 trained tensors: 12 A, 12 B, 4 head",
        "the first gradient is exactly 0 for 12 of 12 A (because B = 0) and for 0 of 12 B",
    ]
    assert all(parameter.grad is None for parameter in runner.model.parameters())


def test_the_sanity_checks_notice_a_B_that_is_not_zero():
    runner, data = runner_of(LoraConfig(r=2, target_modules=["q_lin", "v_lin"], init_lora_weights=False))
    changed, _, first = lora_checks(runner, data)
    assert float(changed.rpartition(" ")[2]) > 0
    assert "exactly 0 for 0 of 12 A" in first


def test_the_sanity_checks_notice_a_tensor_without_gradient():
    runner, data = runner_of(QV)
    runner.model.distilbert.unused = torch.nn.Linear(2, 2)
    assert "gradients reach 28 tensors (12 A, 12 B, 4 head), but 30 are trained" in lora_checks(runner, data)


def test_the_hash_of_the_frozen_weights_notices_one_bit():
    """Training does not change it."""
    runner, _ = runner_of(QV)
    layer = next(module for module in runner.model.modules() if isinstance(module, LoRALinear))
    before = frozen_sha256(runner.model)
    with torch.no_grad():
        layer.lora_B.weight += 1
        assert frozen_sha256(runner.model) == before
        layer.weight[0, 0] = torch.nextafter(layer.weight[0, 0], torch.tensor(9.0))
    assert frozen_sha256(runner.model) != before
    assert frozen_sha256(runner_of(None)[0].model) is None


def test_quiet_skips_the_sanity_checks_and_changes_nothing_else(tmp_path, small_model, capsys):
    short = [*SHORT, "--model", str(small_model), "--train-limit", "16", "--test-limit", "8"]
    assert train.main([*short, "--output-dir", str(tmp_path / "loud")]) == 0
    loud = capsys.readouterr().out.splitlines()
    assert train.main([*short, "--quiet", "--output-dir", str(tmp_path / "quiet")]) == 0
    quiet = capsys.readouterr().out.splitlines()
    only = [line for line in loud if line not in quiet and "saved" not in line]
    assert [line.split(":")[0] for line in only] == [
        "LoRA checks",
        "  injection changed the logits by 0.0",
        "  gradients reach exactly the 12 trained tensors",
        "  the first gradient is exactly 0 for 4 of 4 A (because B = 0) and for 0 of 4 B",
        "  frozen weights before training",
        "  frozen weights after training",
    ]
    assert only[-1].endswith("unchanged")
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("loud", "quiet")]
    assert weights[0] == weights[1]


def test_each_method_trains_and_saves_what_its_name_says(runs, small_model):
    trainable = {method: read_json(runs / method / "results.json")["parameters"]["trainable"] for method in LEARNING_RATES}
    base = load_pretrained(str(small_model), 4)[0].state_dict()
    head = DIM * DIM + DIM + 4 * DIM + 4
    assert trainable == {
        "lora": head + LAYERS * 2 * 2 * (DIM + DIM),
        "head": head,
        "full": sum(tensor.numel() for tensor in base.values()),
    }
    assert {method: (runs / method / "model").exists() for method in trainable} == {"lora": False, "head": False, "full": True}
    full = load_pretrained(str(runs / "full" / "model"), 4)[0].state_dict()
    unchanged = [name for name, tensor in full.items() if torch.equal(tensor, base[name])]
    assert unchanged == []


def test_the_optimizer_holds_two_numbers_for_each_trained_one(runs):
    """And a count of the steps for each tensor."""
    for method, tensors in [("lora", 12), ("head", 4), ("full", 8 + 16 * LAYERS)]:
        results = read_json(runs / method / "results.json")
        assert results["train"]["optimizer_bytes"] == 2 * 4 * results["parameters"]["trainable"] + 4 * tensors


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_every_method_predicts_as_accurately_as_the_run_measured(runs, method):
    classifier = load_classifier(runs / method, device="cpu")
    names = classifier.label_names
    assert names == ["World", "Sports", "Business", "Sci/Tech"]
    test = load_dataset("sample").limited(None, 48, seed=0).test
    answers = list(classifier.label(test.texts))
    right = sum(answer["label"] == names[label] for answer, label in zip(answers, test.labels, strict=True))
    # The adapter is merged, perhaps in bfloat16, which can change the label of a text with a close score.
    assert right / 48 == pytest.approx(read_json(runs / method / "results.json")["after"]["accuracy"], abs=0.05)


def test_peft_loads_a_trained_head(runs, small_model):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(small_model)
    theirs = peft.PeftModel.from_pretrained(base, runs / "head" / "adapter").eval()
    classifier = load_classifier(runs / "head", device="cpu")
    ids = torch.tensor([classifier.tokenizer.encode("Oil prices rose on Monday").ids])
    ours = classifier.runner.model.float()(ids)
    assert torch.allclose(theirs(ids).logits, ours, atol=0.02)


def test_transformers_loads_a_fully_fine_tuned_model(runs):
    classify = transformers.pipeline("text-classification", str(runs / "full" / "model"))
    assert classify("Oil prices rose on Monday")[0]["label"] in ("World", "Sports", "Business", "Sci/Tech")


def test_full_fine_tuning_resumes_bit_for_bit(tmp_path, small_model):
    short = [*SHORT, "--model", str(small_model), "--method", "full", "--train-limit", "48", "--test-limit", "8", "--quiet"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main([*short, "--output-dir", str(whole)]) == 0
    program = (
        "import os, signal, sys, train\nfrom training import checkpoint\n"
        "save = checkpoint.Checkpoints.save\n"
        "def die(self, step, *rest):\n"
        "    save(self, step, *rest)\n"
        "    step == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.Checkpoints.save = die\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    assert python("-c", program, *short, "--checkpoint-every", "1", "--output-dir", cut).returncode == -9
    assert train.main(["--resume", str(cut)]) == 0
    assert (cut / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "prefix"], "--method is 'prefix'. Choose from lora, full, head"),
        (["--method", "full", "--r", "8"], "--r needs --method lora, but --method is full. Drop one of them"),
        (["--method", "head", "--use-dora"], "--use-dora needs --method lora, but --method is head. Drop one of them"),
        (["--method", "full", "--merged-output", "x"], "--merged-output needs an adapter"),
    ],
)
def test_an_option_that_contradicts_the_method_is_refused(options, message, capsys):
    assert train.main(options) == 2
    assert message in capsys.readouterr().err


def test_each_method_has_its_own_default_learning_rate():
    assert {method: Options(method=method).learning_rate for method in LEARNING_RATES} == LEARNING_RATES
    assert Options(method="full", learning_rate=0.25).learning_rate == 0.25
    assert set(LORA_OPTIONS) <= set(Options.__dataclass_fields__)


@pytest.mark.parametrize(("method", "said"), [("full", "Every weight was trained"), ("head", "Only the head was trained")])
def test_the_report_of_a_run_without_lora_says_so(runs, method, said, tmp_path):
    assert report.main([str(runs / method), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert said in page
    assert f"--method {method}</h1>" in page
    assert "Labelled wrong: " in page
    assert page.count("<figure>") == 3  # the matrix, the classes, the curves


# The model card


def card_of(folder: Path) -> tuple[dict, str]:
    """The header and the text."""
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_has_the_header_for_the_hub_and_the_scores(whole_run):
    run, _ = whole_run
    header, text = card_of(run / "adapter")
    results = read_json(run / "results.json")
    assert header["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert header["library_name"] == "peft"
    assert "base_model:adapter:sentence-transformers/all-MiniLM-L6-v2" in header["tags"]
    (index,) = header["model-index"]
    metrics = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert metrics["f1"] == round(results["after"]["macro_f1"], 4)
    assert metrics["accuracy"] == round(results["after"]["accuracy"], 4)
    assert "datasets" not in header  # the sample is not on the hub
    for name in ("World", "Sports", "Business", "Sci/Tech"):
        assert name in text
    assert f"{results['before']['macro_f1']:.4f}" in text
    assert str(Path.cwd()) not in text


def test_the_card_of_the_experiment_has_the_ids_of_the_hub(whole_run):
    results = read_json(whole_run[0] / "results.json") | {"model": "distilbert-base-uncased", "dataset": "ag_news"}
    _, header, text = model_card(results).split("---\n", 2)
    header = yaml.safe_load(header)
    assert (header["base_model"], header["datasets"]) == ("distilbert-base-uncased", ["SetFit/ag_news"])
    assert header["model-index"][0]["results"][0]["dataset"]["type"] == "SetFit/ag_news"
    assert 'from_pretrained("distilbert-base-uncased", id2label=names)' in text
    assert "as-distilbert" not in text  # its tensors have DistilBERT's names already


def test_the_card_of_a_full_model_is_for_transformers(runs):
    header, _ = card_of(runs / "full" / "model")
    assert header["library_name"] == "transformers"
    assert not any(tag.startswith("base_model:adapter") or tag == "lora" for tag in header["tags"])
    assert "lora" not in card_of(runs / "head" / "adapter")[0]["tags"]


@pytest.mark.parametrize("method", ["minilm", "lora", "head", "full"])
def test_the_code_on_a_card_runs(runs, method, small_model, whole_run, tmp_path, monkeypatch, capsys):
    run = whole_run[0] if method == "minilm" else runs / method
    folder = run / ("model" if method == "full" else "adapter")
    blocks = re.findall(r"```python\n(.*?)```", card_of(folder)[1], flags=re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        code = block.replace("THIS_FOLDER", str(folder)).replace("BASE_MODEL", str(small_model))
        exec(code.replace('"a text"', '"Oil prices rose on Monday"'), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(blocks)
    predict.main([str(run), "Oil prices rose on Monday", "--json"])
    ours = json.loads(capsys.readouterr().out)
    for line in printed:
        answer = ast.literal_eval(line)[0]
        assert answer["label"] == ours["label"]
        assert answer["score"] == pytest.approx(ours["score"], abs=0.02)


def test_the_card_has_no_local_path_and_allows_any_label_name(tmp_path, small_model):
    data = tmp_path / "my news"
    data.mkdir()
    for name in ("train", "test"):
        rows = [{"text": f"text {i}", "label": ["a|b", "two\nlines: x", "c", "d"][i % 4]} for i in range(8)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    assert train.main(["--model", str(small_model), "--dataset", str(data), "--epochs", "1", "--output-dir", str(folder)]) == 0
    header, text = card_of(folder / "adapter")
    assert str(tmp_path) not in (folder / "adapter" / "README.md").read_text()
    assert header["model-index"][0]["results"][0]["dataset"]["name"] == "my news"
    assert r"names = {0: 'a|b', 1: 'c', 2: 'd', 3: 'two\nlines: x'}" in text


# TensorBoard


def test_tensorboard_shows_the_metrics(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs / "lora" / EVENTS))
    events.Reload()
    lines = [json.loads(line) for line in (runs / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert lines
    for name in lines[0].keys() - {"step"}:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, small_model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main([*SHORT, "--model", str(small_model), "--tensorboard", "--output-dir", str(tmp_path / "run")]) == 2
    assert "pip install -e '.[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# compare.py


@pytest.mark.slow
def test_compare_runs_every_method_and_prints_one_table(tmp_path, small_model, capsys):
    folder = tmp_path / "three"
    assert compare.main([*SHORT, "--model", str(small_model), "--r", "4", "--output-dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model {small_model}, data sample: 96 training examples, epochs: 1"
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[1:]]
    assert [row[0] for row in cells[1:]] == ["lora", "all-linear", "full", "head", "TF-IDF"]
    for method, trained, _, optimizer, saved, memory, _, f1 in cells[1:-1]:
        results = read_json(folder / method / "results.json")
        assert results["options"]["r"] == (2 if method in ("full", "head") else 4)
        assert (results["options"]["target_modules"] == ["all-linear"]) == (method == "all-linear")
        assert results["seed"] == 0
        assert trained == f"{results['parameters']['trainable']:,}"
        assert float(optimizer) == pytest.approx(8 * results["parameters"]["trainable"] / 1e6, abs=0.1)
        assert float(saved) == pytest.approx(4 * results["parameters"]["trainable"] / 1e6, abs=0.1)
        assert memory == f"{results['train']['peak_memory_mb']:,.0f}"
        assert f1 == f"{results['after']['macro_f1']:.4f}"


LINEAR_ROW = {
    "seed": 3,
    "dataset": "sample",
    "dataset_commit": None,
    "options": {"train_limit": 64, "seed": 3, "class_weights": "balanced"},
}


def test_compares_linear_model_is_that_of_scikit_learn():
    [[name, parameters, *_, score]] = compare.linear_model(LINEAR_ROW)
    data = load_dataset("sample").limited(64, None, seed=3)
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC(class_weight="balanced", random_state=3)
    )
    predicted = model.fit(data.train.texts, data.train.labels).predict(data.test.texts)
    assert (name, parameters) == ("TF-IDF", f"{4 * len(model[0].vocabulary_) + 4:,}")
    assert score == f"{f1_score(data.test.labels, predicted, average='macro'):.4f}"


def test_compare_leaves_the_linear_model_out_where_it_cannot_be_trained(tmp_path, monkeypatch, capsys):
    (tmp_path / "digits.csv").write_text("text,label\n" + "".join(f"{i % 7},{'ab'[i % 2]}\n" for i in range(40)))
    assert compare.linear_model(LINEAR_ROW | {"dataset": str(tmp_path / "digits.csv")}) == []
    assert "TF-IDF is left out: a linear model cannot be trained on these texts: empty vocabulary" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    assert compare.linear_model(LINEAR_ROW) == []
    assert "TF-IDF is left out: a linear model needs scikit-learn: pip install scikit-learn" in capsys.readouterr().err


def test_compare_refuses_wrong_options_before_it_runs_anything(capfd):
    assert compare.main(["--method", "lora"]) == 2
    assert "--method is not for compare.py" in capfd.readouterr().err
    assert compare.main(["--batch-size", "0"]) == 2
    assert "--batch-size is 0" in capfd.readouterr().err


def test_compare_stops_at_a_run_that_fails(tmp_path, capfd):
    assert compare.main(["--model", "minilm", "--dataset", "nowhere", "--output-dir", str(tmp_path / "x")]) == 2
    printed = capfd.readouterr().err
    assert "there is no data set 'nowhere'" in printed
    assert "the run of lora failed" in printed
    assert "all-linear" not in printed
