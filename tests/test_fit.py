"""`fit` in train.py, and the Classifier that it returns: texts and labels in memory, as a notebook has them."""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import save_quick_model

import predict
import train
from common.errors import UserError
from train import fit, load
from training.checkpoint import Checkpoints
from training.inference import load_classifier

TEXTS = [f"{word} number {i} came on {day}" for i in range(8) for word, day in [("refund", "Monday"), ("password", "Friday")]]
NAMES = ["billing", "login"] * 8
SHORT = {"epochs": 1, "quiet": True, "device": "cpu", "dtype": "float32", "max_length": 32}
pytestmark = pytest.mark.usefixtures("one_thread")


class Column:
    """As a column of pandas whose index does not count from 0: it iterates over its values, and [0] is an error."""

    def __init__(self, values):
        self.values = np.array(values, dtype=None if isinstance(values[0], int) else object)

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_file):
    """A small DistilBERT with random weights, for two classes."""
    return save_quick_model(tmp_path_factory.mktemp("base") / "model", tokenizer_file, num_labels=2)


@pytest.fixture(scope="module")
def options(base):
    return SHORT | {"model": str(base)}


@pytest.fixture(scope="module")
def classifier(options, tmp_path_factory):
    return fit(TEXTS, NAMES, **options, output_dir=tmp_path_factory.mktemp("fit") / "run")


def test_the_answers_are_those_of_predict_py(classifier, capsys):
    texts = [*TEXTS[:5], "one", ""]
    assert predict.main([str(classifier.folder), "--json", "--device", "cpu", "--dtype", "float32", *texts]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = classifier.predict_proba(texts)
    assert scores.shape == (7, 2)
    assert np.allclose(scores.sum(axis=1), 1)
    assert list(classifier.classes_) == ["billing", "login"]
    for answer, label, row in zip(answers[:6], classifier.predict(texts), scores, strict=False):
        assert label == answer["label"] == classifier.classes_[row.argmax()]
        assert row == pytest.approx([answer["scores"][name] for name in classifier.classes_], abs=1e-6)
    assert classifier.predict([]).shape == (0,)
    assert classifier.predict_proba([]).shape == (0, 2)


def test_a_tenth_is_put_aside_and_its_score_is_shown(classifier):
    results = json.loads((classifier.folder.parent / "results.json").read_text())
    assert classifier.test_scores == results["after"]
    assert sum(map(sum, results["after"]["confusion_matrix"])) == 2
    assert f"macro-F1 {results['after']['macro_f1']:.4f}" in repr(classifier)


def test_a_saved_classifier_is_loaded_again_and_is_an_adapter_of_peft(classifier, tmp_path, base):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    classifier.save(tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu", dtype="float32")
    assert np.array_equal(again.predict_proba(TEXTS), classifier.predict_proba(TEXTS))
    with pytest.raises(UserError, match="exists"):
        classifier.save(base)

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "saved").eval()
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        scores = theirs(inputs["input_ids"], inputs["attention_mask"]).logits.softmax(-1)
    assert np.allclose(scores, classifier.predict_proba(TEXTS[:1]), atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "classes", "method"),
    [
        (["10", "9"] * 8, ["10", "9"], "head"),
        ([True, False] * 8, [False, True], "full"),
        ([" b", "é"] * 8, [" b", "é"], "lora"),
    ],
)
def test_labels_come_back_as_they_were_given(options, tmp_path, labels, classes, method):
    trained = fit(TEXTS, labels, **options, method=method, output_dir=tmp_path / "run")
    for one in (trained, load(tmp_path / "run")):
        assert one.classes_.tolist() == classes
        predicted = one.predict(TEXTS)
        assert predicted.dtype == np.array(classes).dtype
        assert set(predicted.tolist()) <= set(classes)


def test_columns_arrays_and_test_rows_in_another_thread(options, tmp_path):
    """Only the main thread may set the handlers of signals."""
    more = {"r": np.int64(3), "target_modules": "k_lin", "learning_rate": 1, "test": (np.array(TEXTS[:3]), iter([1, 2, 1]))}
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fit, Column(TEXTS), Column([1, 2] * 8), **options | more, output_dir=tmp_path / "run").result()
    assert signal.getsignal(signal.SIGINT) is before
    assert np.array_equal(first.predict_proba(Column(TEXTS)), first.predict_proba(np.array(TEXTS)))
    assert sum(map(sum, first.test_scores["confusion_matrix"])) == 3
    assert json.loads((tmp_path / "run" / "results.json").read_text())["train"]["rows"] == 16
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (3, ["k_lin"])


@pytest.mark.parametrize(
    ("texts", "labels", "keywords", "message"),
    [
        ([], [], {}, "texts: the list is empty"),
        (TEXTS, NAMES[:5], {}, "texts: 16, labels: 5. Give one label for each text"),
        ("one text", ["a"], {}, "texts: this is one string. Put it into a list"),
        (["a", float("nan")], ["x", "y"], {}, r"texts\[1\] is nan, of type float"),
        (TEXTS, ["x"] * 16, {}, "every label is 'x'. At least two classes are needed"),
        (TEXTS, [1.0, 2.0] * 8, {}, r"labels\[0\] is 1.0, of type float"),
        (TEXTS, [1, None] * 8, {}, r"labels\[1\] is None"),
        (TEXTS, [1, "x"] * 8, {}, r"labels\[1\] is 'x' after 1. Give either names or numbers"),
        (TEXTS, ["a", "a "] * 8, {}, "both called 'a'"),
        (["", *TEXTS[1:]], NAMES, {}, "the text is empty"),
        (TEXTS, NAMES, {"epoch": 3}, "fit has no option 'epoch'. Did you mean epochs?"),
        (TEXTS, NAMES, {"dataset": "x.csv"}, "fit has no option 'dataset'"),
        (TEXTS, NAMES, {"epochs": "3"}, "epochs is '3'. Its type must be int"),
        (TEXTS, NAMES, {"epochs": True}, "epochs is True. Its type must be int"),
        (TEXTS, NAMES, {"target_modules": [1]}, r"target_modules is \[1\]. Its type must be str, or a list of them"),
        (TEXTS, NAMES, {"epochs": 0}, "--epochs is 0"),
        (TEXTS, NAMES, {"output_dir": "."}, r"\. exists and is not an empty folder"),
        (TEXTS, NAMES, {"test": (["a"], ["other"])}, "the test labels contain 'other'"),
        (TEXTS, NAMES, {"test": (["a"], [])}, "the test texts: 1, the test labels: 0"),
    ],
)
def test_a_wrong_call_is_one_line_and_leaves_nothing_behind(options, tmp_path, texts, labels, keywords, message):
    with pytest.raises(UserError, match=message) as caught:
        fit(texts, labels, **options | {"output_dir": str(tmp_path / "run")} | keywords)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_fit_in_several_processes_is_refused(options, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        fit(TEXTS, NAMES, **options, output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("texts", ["one string", ["a", None], [b"bytes"]])
def test_a_wrong_text_to_predict_is_refused(classifier, texts):
    with pytest.raises(UserError, match="string"):
        classifier.predict(texts)


def test_an_interrupted_fit_says_how_to_go_on_and_can(options, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_and_interrupt(self, step, *state):
        save(self, step, *state)
        if step == 1:
            signal.raise_signal(signal.SIGINT)  # as Jupyter does

    monkeypatch.setattr(Checkpoints, "save", save_and_interrupt)
    keywords = options | {"output_dir": str(tmp_path / "run"), "epochs": 2, "batch_size": 8, "checkpoint_every": 1}
    numbers = [10 + NAMES.index(name) for name in NAMES]
    with pytest.raises(KeyboardInterrupt, match=r"python train\.py --resume") as caught:
        fit(TEXTS, numbers, **keywords)
    kept = caught.value  # as a notebook does, with its traceback and so every object of the run
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert kept.__traceback__ is not None
    whole = fit(TEXTS, numbers, **keywords | {"output_dir": str(tmp_path / "whole")})
    resumed = load(tmp_path / "run", device="cpu", dtype="float32")
    assert np.array_equal(resumed.predict_proba(TEXTS), whole.predict_proba(TEXTS))
    assert resumed.predict(TEXTS).tolist() == whole.predict(TEXTS).tolist()
    assert set(resumed.predict(TEXTS).tolist()) <= set(numbers)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_eight_threads_get_the_answers_of_one(options, classifier, dtype):
    shared = load_classifier(classifier.folder, device="cpu", dtype=dtype)
    lists = [[f"{'refund and ' * (7 * i % 40)}password {j}" for j in range(1 + i % 3)] for i in range(16)]
    alone = [shared.predict_proba(texts) for texts in lists]
    ready = threading.Barrier(8)

    def label(first: int) -> list[bool]:
        ready.wait()
        order = [(first + i) % 16 for i in range(16)]
        return [np.array_equal(shared.predict_proba(lists[i]), alone[i]) for i in order]

    with ThreadPoolExecutor(8) as pool:
        equal = list(pool.map(label, range(0, 16, 2)))
    assert len(equal) == 8
    assert all(all(answers) for answers in equal)
