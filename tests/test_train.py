"""The experiment as a user runs it, on the embedded encoder and corpus; and its metric, schedule and options."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import sklearn.metrics
import torch
import transformers
from helpers import stop_after
from safetensors.torch import load_file
from tokenizers import Tokenizer

from common.errors import UserError
from data import load_dataset
from lora import PeftModel
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained
from model.pretrained import EMBEDDED_SHA256
from reporting.results import read_mistakes
from train import main
from training.device import DTYPES, cast_frozen_matrices, choose_device, choose_dtype, peak_memory_mb, time_products
from training.evaluation import confusion_matrix, macro_f1
from training.inference import load_classifier
from training.optimizer import lr_multiplier
from training.options import Options, parse

ROOT = Path(__file__).parent.parent
SHORT = ["--model", "minilm", "--dataset", "sample", "--train-limit", "48", "--test-limit", "16", "--epochs", "1"]


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_macro_f1_is_that_of_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    for size in (1, 5, 50, 1000):
        labels, predictions = rng.integers(classes, size=(2, size))
        matrix = confusion_matrix(labels, predictions, classes)
        assert matrix.tolist() == sklearn.metrics.confusion_matrix(labels, predictions, labels=range(classes)).tolist()
        assert macro_f1(matrix) == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro"), abs=1e-12)


def test_macro_f1_leaves_out_only_absent_classes():
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])
    f1 = (4 / 5 + 2 / 3) / 2  # class 0: TP 2, FP 1; class 1: TP 1, FN 1
    assert macro_f1(confusion_matrix(labels, predictions, 4)) == pytest.approx(f1)
    predictions[3] = 2  # never right, but predicted
    assert macro_f1(confusion_matrix(labels, predictions, 4)) == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(
    "typed",
    [["--train-limit", "50", "--test-limit", "15"], ["--test-share", "0.2", "--text-column", "said", "--label-column", "kind"]],
)
def test_a_file_sorted_by_class_trains_and_tests_both_classes(tmp_path, small_model, capsys, typed):
    """The counts are printed before training; a report draws the same examples."""
    rows = [f"a text {i} that is {kind},{kind}\n" for kind in ("neg", "pos") for i in range(60)]
    if "--test-limit" in typed:
        for part in ("train", "test"):
            (tmp_path / f"{part}.csv").write_text("text,label\n" + "".join(rows))
        dataset, counts = tmp_path, "  neg                  25 + 8\n  pos                  25 + 7\n"
    else:
        dataset, counts = tmp_path / "my.csv", "  neg                  48 + 12\n  pos                  48 + 12\n"
        counts += "  always 'neg': accuracy 0.500\nmy.csv: 24 of 120 rows"
        dataset.write_text("id,said,kind\n" + "".join(f"{i},{row}" for i, row in enumerate(rows)))
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, num_labels=2)
    model, tokenizer = DistilBertForSequenceClassification(config), Tokenizer.from_file(str(small_model / "tokenizer.json"))
    save_pretrained(model, tokenizer, tmp_path / "base")
    run = tmp_path / "run"
    where = ["--dataset", str(dataset), "--model", str(tmp_path / "base"), "--output-dir", str(run)]
    assert main([*where, *typed, "--epochs", "1", "--max-length", "16", "--dtype", "float32", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert counts in out[: out.index("trainable params")]
    results = json.loads((run / "results.json").read_text())
    assert None not in results["after"]["per_class_f1"].values()
    read_mistakes(run, results)  # raises if the predictions are not those of the matrix


def test_the_learning_rate_rises_and_falls_linearly():
    rates = [lr_multiplier(step, 100, 0.1) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    falls = np.diff(rates[9:])
    assert falls == pytest.approx([falls[0]] * 90)
    assert 0 < rates[-1] < 0.02
    assert lr_multiplier(1, 3, 0.0) == 1.0
    assert 0 < lr_multiplier(1, 1, 1.0) <= 1.0


@pytest.mark.parametrize("local_rank", ["2", "abc", "-1"])
def test_a_gpu_that_is_not_there_is_refused(local_rank, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(UserError, match=f"LOCAL_RANK is {local_rank}, but this machine has 2 GPUs"):
        choose_device("auto")


def test_labelling_imports_neither_the_compiler_of_torch_nor_the_client_of_the_hub(whole_run):
    """torch.optim imports the one when the first optimizer is made: two seconds. The other takes 0.15 s."""
    program = "import sys, predict; predict.main(sys.argv[1:]); print({'torch._dynamo', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program, str(whole_run[0]), "Goal!"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peak_memory_is_not_that_of_the_parent_process():
    large = np.ones(125_000_000)  # 1 GB
    program = "import torch; from training import device; print(device.peak_memory_mb(torch.device('cpu')))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert 50 < float(done.stdout) < large.nbytes / 1e6 < peak_memory_mb(torch.device("cpu"))


def test_casting_copies_every_frozen_tensor():
    model, _ = load_pretrained("minilm", 2)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    cast_frozen_matrices(model, torch.bfloat16)
    assert all(parameter.data_ptr() != before[name] for name, parameter in model.named_parameters())


def test_every_option_is_a_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in text for name in Options.__dataclass_fields__)
    assert Options(**parse([], None)) == Options()
    words = ["--r", "8", "--target-modules", "k_lin", "q_lin", "--learning-rate", "5e-4", "--model", "./here"]
    typed = Options(**parse(words, None))
    assert (typed.r, list(typed.target_modules), typed.learning_rate, typed.model) == (8, ["k_lin", "q_lin"], 5e-4, "./here")


def test_a_target_with_special_characters_is_a_regular_expression():
    assert Options(target_modules=("all-linear",)).lora_config("base", None).target_modules == "all-linear"
    assert Options(target_modules=(r".*\.q_lin",)).lora_config("base", None).target_modules == r".*\.q_lin"
    assert Options(target_modules=("q_lin",)).lora_config("base", None).target_modules == ["q_lin"]


def test_auto_takes_the_faster_arithmetic(monkeypatch):
    """Having bfloat16 instructions does not make them fast."""
    cpu, timings = torch.device("cpu"), {torch.bfloat16: 0.030, torch.float32: 0.020}
    monkeypatch.setattr("training.device.time_products", lambda dtypes: timings)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_dtype("auto", cpu) == (torch.float32, "measured on this processor: bfloat16 30.0 ms, float32 20.0 ms")
    timings[torch.float32] = 0.040
    assert choose_dtype("auto", cpu)[0] == torch.bfloat16
    timings[torch.float32] = 0.029  # a near tie: bfloat16 needs less memory
    assert choose_dtype("auto", cpu)[0] == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_dtype("auto", cpu) == (torch.float32, "this cpu does not multiply bfloat16 natively")


def test_a_typed_arithmetic_is_used_without_measuring(monkeypatch):
    monkeypatch.delattr("training.device.time_products")
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    for name in ("float32", "bfloat16", "int8"):
        assert choose_dtype(name, torch.device("cpu")) == (getattr(torch, name), "as typed")


def test_int8_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(UserError, match="--dtype int8 runs on x86 processors, and this is cpu on arm64"):
        choose_dtype("int8", torch.device("cpu"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(UserError, match="this is cuda on x86_64"):
        choose_dtype("int8", torch.device("cuda"))


def test_auto_takes_int8_only_where_it_is_a_candidate(monkeypatch):
    cpu, asked = torch.device("cpu"), []
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)

    def timings(dtypes):
        asked.append(dtypes)
        return {dtype: {torch.bfloat16: 0.03, torch.float32: 0.02, torch.int8: 0.01}[dtype] for dtype in dtypes}

    monkeypatch.setattr("training.device.time_products", timings)
    assert choose_dtype("auto", cpu)[0] == torch.float32
    assert choose_dtype("auto", cpu, DTYPES)[0] == torch.int8
    assert asked == [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32, torch.int8)]


def test_the_products_of_each_type_are_timed():
    types = [torch.float32, torch.int8] if platform.machine() in ("x86_64", "AMD64") else [torch.float32]
    seconds = time_products(tuple(types), repeats=2)
    assert list(seconds) == types
    assert all(0 < value < 60 for value in seconds.values())


def test_results_record_what_was_used(whole_run):
    results = json.loads((whole_run[0] / "results.json").read_text())
    assert results["commit"] is None  # nothing came from the hub
    assert results["sha256"]["weights"] == EMBEDDED_SHA256["model.safetensors"]
    assert re.fullmatch("[0-9a-f]{64}", results["sha256"]["data"])
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"].keys() == {"python", "torch", "tokenizers", "safetensors", "huggingface-hub", "numpy"}


def test_the_sample_is_learned(whole_run):
    folder, printed = whole_run
    results = json.loads((folder / "results.json").read_text())
    assert results["before"]["macro_f1"] < 0.45
    assert results["after"]["macro_f1"] >= 0.90
    assert f"macro-F1 before training: {results['before']['macro_f1']:.4f}" in printed
    assert f"macro-F1 after training:  {results['after']['macro_f1']:.4f}" in printed
    assert "(reloaded: equal logits)" in printed
    assert "trainable params: 167,812 || all params: 22,881,800 || trainable%: 0.7334" in printed


def test_results_json_is_complete(whole_run):
    results = json.loads((whole_run[0] / "results.json").read_text())
    assert (results["model"], results["dataset"], results["embedded"]) == ("minilm", "sample", True)
    assert (results["seed"], results["device"]) == (0, "cpu")
    assert results["parameters"] == {"trainable": 167_812, "all": 22_881_800, "percent": 0.7334}
    assert results["options"]["r"] == 2
    assert results["options"]["target_modules"] == ["q_lin", "v_lin"]
    for when in ("before", "after"):
        matrix = np.array(results[when]["confusion_matrix"])
        assert matrix.sum() == 136  # every test example exactly once
        assert matrix.sum(axis=1).tolist() == [34, 34, 34, 34]
        assert results[when]["macro_f1"] == macro_f1(matrix)
        assert list(results[when]["per_class_f1"]) == ["World", "Sports", "Business", "Sci/Tech"]
    measured = results["train"]
    assert measured["examples"] == 536 * results["options"]["epochs"]
    assert measured["examples_per_second"] == pytest.approx(measured["examples"] / measured["seconds"], rel=0.01)
    assert 200 < measured["peak_memory_mb"] < 4000


TEXTS = [
    "Stocks fell in Tokyo as the central bank raised rates.",
    "The striker scored twice in the final.",
    "Votes are counted.",
]


def test_the_adapter_and_its_base_are_enough(whole_run, tmp_path):
    """Here and in peft, over the encoder exported for transformers."""
    adapter = whole_run[0] / "adapter"
    names = json.loads((adapter / "label_names.json").read_text())
    assert names == ["World", "Sports", "Business", "Sci/Tech"]
    tokenizer = Tokenizer.from_file(str(adapter / "tokenizer.json"))
    base, _ = load_pretrained("minilm", len(names))
    save_pretrained(base, tokenizer, tmp_path / "base")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    ours = PeftModel.from_pretrained(base, adapter)
    for text, name in zip(TEXTS, ["Business", "Sports", "World"], strict=True):
        input_ids = torch.tensor([tokenizer.encode(text).ids])
        logits = ours(input_ids)
        torch.testing.assert_close(logits, theirs(input_ids=input_ids).logits, atol=1e-4, rtol=0)
        assert names[logits.argmax()] == name


def test_the_merged_model_gives_the_same_labels_and_scores_in_a_pipeline_of_transformers(whole_run):
    adapter, merged = whole_run[0] / "adapter", whole_run[0].with_name("merged")
    base, tokenizer = load_pretrained("minilm", 4)
    ours = PeftModel.from_pretrained(base, adapter)
    pipeline = transformers.pipeline("text-classification", model=str(merged))
    for answer, text in zip(pipeline(TEXTS, batch_size=3), TEXTS, strict=True):
        scores = ours(torch.tensor([tokenizer.encode(text).ids])).softmax(dim=-1)[0]
        assert answer["label"] == ["World", "Sports", "Business", "Sci/Tech"][scores.argmax()]
        assert answer["score"] == pytest.approx(scores.max().item(), abs=1e-4)


def test_an_adapter_that_reloads_differently_is_not_kept(tmp_path, monkeypatch):
    load = PeftModel.from_pretrained

    def load_badly(base, folder, **how):
        model = load(base, folder, **how)
        model.distilbert.transformer.layer[0].attention.q_lin.lora_B.weight.data += 1
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", load_badly)
    with pytest.raises(AssertionError, match="the logits differ"):
        main([*SHORT, "--train-limit", "16", "--output-dir", str(tmp_path / "run")])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_metrics_jsonl_has_a_line_every_ten_steps(whole_run):
    folder = whole_run[0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = json.loads((folder / "results.json").read_text())["train"]["steps"]
    assert [line["step"] for line in lines] == [*range(10, steps, 10), steps]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert set(lines[0]) == {"step", "epoch", "loss", "learning_rate", "gradient_norm", "examples_per_second"}


def test_the_same_seed_gives_the_same_numbers(tmp_path, small_model):
    runs = []
    for name, seed in (("one", "0"), ("two", "0"), ("three", "1")):
        assert main([*SHORT, "--model", str(small_model), "--seed", seed, "--output-dir", str(tmp_path / name)]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        losses = [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        runs.append((results["before"], results["after"], losses))
    assert runs[0] == runs[1]
    assert runs[0][2] != runs[2][2]


emulated = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 is emulated here, and slow")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=emulated)])
@pytest.mark.parametrize("options", [["--bias", "all"], ["--bias", "lora_only"], ["--target-modules", "all-linear"]])
def test_gradients_reach_exactly_what_is_trained(tmp_path, capsys, options, dtype):
    few = ["--train-limit", "16", "--test-limit", "8", "--max-length", "16"]
    assert main([*SHORT, *few, *options, "--dtype", dtype, "--output-dir", str(tmp_path / "run")]) == 0
    assert "gradients reach exactly the " in capsys.readouterr().out


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86")
def test_training_in_int8_is_close_to_float32_resumes_and_is_used_over_the_real_weights(tmp_path, small_model, monkeypatch):
    torch.manual_seed(0)
    model = DistilBertForSequenceClassification(DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128, num_labels=4))
    save_pretrained(model, Tokenizer.from_file(str(small_model / "tokenizer.json")), tmp_path / "base")
    few = ["--train-limit", "48", "--test-limit", "40", "--epochs", "2", "--max-length", "24", "--learning-rate", "0.003"]
    words = ["--model", str(tmp_path / "base"), "--dataset", "sample", *few, "--quiet"]
    for dtype in ("float32", "int8"):
        assert main([*words, "--dtype", dtype, "--output-dir", str(tmp_path / dtype)]) == 0
    real, rounded = (load_file(tmp_path / dtype / "adapter" / "adapter_model.safetensors") for dtype in ("float32", "int8"))
    for name, tensor in real.items():
        if "lora_B" in name:
            assert 0 < (rounded[name] - tensor).norm() < 0.3 * tensor.norm(), name
    results = json.loads((tmp_path / "int8" / "results.json").read_text())
    assert results["dtype"] == "int8"
    test = load_dataset("sample").limited(None, 40, seed=0).test
    classifier = load_classifier(tmp_path / "int8", dtype="float32")
    predicted = np.array([classifier.label_names.index(answer["label"]) for answer in classifier.label(test.texts)])
    assert confusion_matrix(test.labels, predicted, 4).tolist() == results["after"]["confusion_matrix"]

    stop_after(monkeypatch, 4)
    run = tmp_path / "stopped"
    assert main([*words, "--dtype", "int8", "--checkpoint-every", "1", "--output-dir", str(run)]) == 143
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in rounded.items())
