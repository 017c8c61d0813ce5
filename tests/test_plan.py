"""How long a run trains, at which rates, what each class weighs, and which state of it is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import adapted, base_model, stop_after, trainable
from processes import Python, start_ranks
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight

from common.errors import UserError
from data import load_dataset
from train import main
from training.checkpoint import Checkpoints
from training.optimizer import parameter_groups
from training.options import MIN_EPOCHS, MIN_STEPS, Options
from training.plan import balanced_weights, loss_function, plan
from training.validation import LOOKS, Validation


@pytest.mark.parametrize("rows", [10, 16, 17, 100, 320, 999, 4_000, 67_594, 120_000])
@pytest.mark.parametrize("batch_size", [1, 8, 16, 200])
def test_a_run_has_three_epochs_and_at_least_so_many_steps_but_no_epoch_too_many(rows, batch_size):
    (epochs, steps), each = plan(rows, Options(batch_size=batch_size)), -(-rows // batch_size)
    assert steps == epochs * each >= MIN_STEPS
    assert epochs >= MIN_EPOCHS
    assert epochs == MIN_EPOCHS or (epochs - 1) * each < MIN_STEPS


def test_three_epochs_typed_are_three():
    assert plan(10, Options(epochs=3)) == (3, 3)
    assert plan(120_000, Options(epochs=1)) == (1, 7_500)


def test_balanced_weights_are_those_of_scikit_learn_and_average_to_one():
    labels = np.repeat([0, 1, 2, 3, 4], [240, 30, 15, 9, 6])
    weights = balanced_weights(labels, 5)
    np.testing.assert_allclose(weights, compute_class_weight("balanced", classes=np.arange(5), y=labels), rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1)


def test_the_loss_weighs_and_smooths_by_the_options():
    logits, targets, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 0]), np.array([0, 0, 1, 0])
    log = logits.log_softmax(dim=1)
    each = -log[range(4), targets]
    assert torch.allclose(loss_function(labels, 2, Options())(logits, targets), each.sum())
    weighted = each @ torch.tensor([2 / 3, 2 / 3, 2.0, 2 / 3])
    assert torch.allclose(loss_function(labels, 2, Options(class_weights="balanced"))(logits, targets), weighted)
    smoothed = 0.9 * each.sum() - 0.1 * log.mean(dim=1).sum()
    assert torch.allclose(loss_function(labels, 2, Options(label_smoothing=0.1))(logits, targets), smoothed)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_head_has_a_rate_of_its_own(method):
    model = adapted() if method == "lora" else base_model()
    rates = {id(p): group["initial_lr"] for group in parameter_groups(model, 0.5, 16.0, 4.0) for p in group["params"]}
    for name, parameter in trainable(model).items():
        expected = 8.0 if name.endswith("lora_B.weight") else 2.0 if "classifier" in name else 0.5
        assert rates[id(parameter)] == expected, name
    assert set(rates.values()) == ({8.0, 2.0, 0.5} if method == "lora" else {2.0, 0.5})


# The validation part


@pytest.mark.parametrize(("steps", "looks"), [(4, 4), (10, 10), (252, 10), (12_673, 10)])
def test_the_validation_part_is_looked_at_ten_times_the_last_time_at_the_end(steps, looks):
    validation = Validation(None, object(), 2, None, None)  # type: ignore[arg-type]
    due = [step for step in range(1, steps + 1) if validation.is_due(step, steps)]
    assert len(due) == looks <= LOOKS
    assert due[-1] == steps
    assert max(np.diff([0, *due])) - min(np.diff([0, *due])) <= 1
    assert not Validation(None, None, 2, None, None).is_due(steps, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "patience", "best", "ends"),
    [
        ([0.5, 0.7, 0.7], None, (2, 0.7), [False, False, False]),
        ([0.5, 0.7, 0.7, 0.6], 2, (2, 0.7), [False, False, False, True]),
        ([0.5, 0.4, 0.6], 1, (3, 0.6), [False, True, False]),
    ],
)
def test_the_first_of_the_best_looks_counts_and_patience_ends_the_run(scores, patience, best, ends):
    validation = Validation(None, None, 2, None, patience)  # type: ignore[arg-type]
    assert not validation.ends_the_run()
    for step, (score, end) in enumerate(zip(scores, ends, strict=True), 1):
        validation.looks.append((step, score))
        assert validation.ends_the_run() == end
    assert validation.best_look() == best


def test_a_share_is_stratified_and_never_overlaps(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 5 == 0]} for i in range(200)]
    for part, chosen in [("train", rows[:160]), ("test", rows[160:])]:
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    whole = load_dataset(str(tmp_path)).limited(100, None, seed=1)
    dataset = whole.with_validation(0.2, seed=1)
    assert dataset.validation is not None
    parts = [set(part.texts) for part in (dataset.train, dataset.validation, dataset.test)]
    assert list(map(len, parts)) == [80, 20, 40]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert parts[0] | parts[1] == set(whole.train.texts)
    assert np.bincount(dataset.validation.labels).tolist() == [16, 4]
    assert dataset.validation.texts == whole.with_validation(0.2, seed=1).validation.texts
    assert dataset.validation.texts != whole.with_validation(0.2, seed=2).validation.texts
    assert "20 other examples choose the best state" in dataset.notes[-1]


def test_a_validation_file_is_used_and_needs_no_share(tmp_path):
    for part in ("train", "test", "dev"):
        (tmp_path / f"{part}.csv").write_text(f"text,label\n{part} x,0\n{part} y,1\n")
    dataset = load_dataset(str(tmp_path))
    assert dataset.with_validation(None, 0).validation.texts == ["dev x", "dev y"]
    with pytest.raises(UserError, match="has a validation part: leave out --validation-share"):
        dataset.with_validation(0.5, 0)


@pytest.fixture(scope="module")
def words(small_model) -> list[str]:
    """20 steps. The learning rate is far too high, so that the best state is not the last."""
    few = ["--train-limit", "100", "--test-limit", "20", "--validation-share", "0.2", "--max-length", "24", "--epochs", "4"]
    return [
        "--model",
        str(small_model),
        "--dataset",
        "sample",
        *few,
        "--learning-rate",
        "0.05",
        "--dtype",
        "float32",
        "--quiet",
    ]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validation") / "whole"
    assert main([*words, "--output-dir", str(folder)]) == 0
    return folder


def scored(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_macro_f1"] for line in lines if "validation_macro_f1" in line}


def weights(run: Path) -> bytes:
    return next(run.glob("*/*model.safetensors")).read_bytes()


def test_the_best_state_is_kept(whole, words, tmp_path):
    looks, measured = scored(whole), json.loads((whole / "results.json").read_text())["train"]
    best = max(looks, key=lambda step: looks[step])
    assert list(looks) == list(range(2, 21, 2))
    assert (measured["kept_step"], measured["validation_macro_f1"]) == (best, looks[best])
    assert best < 20  # or this shows nothing
    states = {}
    save = Checkpoints.save

    def note(self, step, *rest):
        states[step] = {name: p.detach().clone() for name, p in trainable(self.state[0]).items()}
        save(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", note)
        assert main([*words, "--checkpoint-every", "1", "--output-dir", str(tmp_path / "run")]) == 0
    kept = load_file(whole / "adapter" / "adapter_model.safetensors")
    for step, state in states.items():
        A = next(state[name] for name in state if name.endswith("lora_A.weight"))
        assert any(torch.equal(A, tensor) for tensor in kept.values()) == (step == best)


@pytest.mark.parametrize(("method", "stop"), [("lora", 7), ("lora", 14), ("full", 7)])
def test_a_stopped_run_keeps_the_same_state(method, stop, words, whole, tmp_path, monkeypatch):
    words = [*words, "--method", method] + (["--learning-rate", "0.01"] if method == "full" else [])
    if method == "full":
        whole = tmp_path / "whole"
        assert main([*words, "--output-dir", str(whole)]) == 0
    stop_after(monkeypatch, stop)
    run = tmp_path / "run"
    assert main([*words, "--checkpoint-every", "7", "--output-dir", str(run)]) == 143
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0
    assert weights(run) == weights(whole)
    assert scored(run) == scored(whole)


def test_patience_ends_a_run_early_also_when_it_is_resumed(words, whole, tmp_path, monkeypatch):
    words = [*words, "--patience", "1"]
    ended, run = tmp_path / "ended", tmp_path / "run"
    assert main([*words, "--output-dir", str(ended)]) == 0
    last = max(scored(ended))
    assert last < 20
    assert scored(ended).items() <= scored(whole).items()
    assert json.loads((ended / "results.json").read_text())["train"]["steps"] == last

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.save_run", die)  # killed after the last step
    assert main([*words, "--output-dir", str(run)]) == 130
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0
    assert weights(run) == weights(ended)


def test_two_processes_choose_the_same_state_as_one(words, whole, tmp_path):
    """Without dropout, which each process draws for itself, so that only the order of sums differs."""
    words = [*words, "--lora-dropout", "0", "--patience", "3"]
    runs = [tmp_path / "one", tmp_path / "two"]
    started = [Python("train.py", *words, "--output-dir", runs[0])]
    started += start_ranks([["train.py", *words, "--output-dir", runs[1]]] * 2)
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert results[1]["processes"] == 2
    assert scored(runs[1]).keys() <= set(range(2, 21, 2))
    assert results[1]["train"]["kept_step"] == max(scored(runs[1]), key=lambda step: scored(runs[1])[step])
