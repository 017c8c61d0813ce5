"""`train.py --adapter`: a run that starts from an adapter."""

import json
import shutil

import pytest
import torch
from helpers import save_quick_model, stop_after

import compare
import train
from lora.adapter import read_adapter
from training.checkpoint import trained_parameters

SHORT = [
    "--dataset",
    "sample",
    "--train-limit",
    "16",
    "--test-limit",
    "8",
    "--epochs",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]
SHORT += ["--max-length", "16"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_file):
    return save_quick_model(tmp_path_factory.mktemp("base") / "model", tokenizer_file, num_labels=4)


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
    """A run with options other than the defaults, so that a run from it must read them."""
    folder = tmp_path_factory.mktemp("first") / "run"
    options = ["--r", "3", "--lora-alpha", "7", "--target-modules", "k_lin", "--learning-rate", "0.05", "--use-dora"]
    assert train.main([*SHORT, "--model", str(base), *options, "--quiet", "--output-dir", str(folder)]) == 0
    return folder


def test_training_starts_at_the_values_of_the_adapter(first, tmp_path, monkeypatch, capsys):
    started: dict[str, torch.Tensor] = {}

    def keep(runner, *rest):
        started.update({name: parameter.detach().clone() for name, parameter in trained_parameters(runner.model).items()})
        return real(runner, *rest)

    real = train.train
    monkeypatch.setattr(train, "train", keep)
    same = ["--lora-alpha", "7", "--use-dora", "--target-modules", "k_lin"]  # may be typed
    assert train.main([*SHORT, "--adapter", str(first), *same, "--output-dir", str(tmp_path / "second")]) == 0
    config, tensors = read_adapter(first / "adapter")
    assert len(tensors) == len(started) == 2 * 3 + 4
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").replace("classifier.", "classifier.trained_module.")
        assert torch.equal(started[f"base_model.{name}"], tensor), key

    printed = capsys.readouterr().out
    assert f"starting from the adapter in {first / 'adapter'} and its head\n" in printed
    assert "injection" not in printed
    (change,) = (line for line in printed.splitlines() if "changed the logits by" in line)
    assert change.startswith(f"  the adapter in {first} changed the logits by ")
    assert float(change.split()[-1]) > 0
    assert "the first gradient is exactly 0 for 0 of 2 A and for 0 of 2 B" in printed
    before, after = (json.loads((run / "results.json").read_text()) for run in (first, tmp_path / "second"))
    assert after["before"] == before["after"]
    assert after["options"] | {"r": 3, "lora_alpha": 7, "use_dora": True, "adapter": str(first)} == after["options"]
    assert len(after["sha256"]["adapter"]) == 64
    card = (tmp_path / "second" / "adapter" / "README.md").read_text()
    assert f"started from another adapter (sha256 {after['sha256']['adapter'][:16]})" in card
    assert str(tmp_path) not in card
    again, _ = read_adapter(tmp_path / "second" / "adapter")
    assert again == config


def test_other_classes_get_a_new_head(first, tmp_path, capsys):
    rows = "".join(f"{name} {i},{name}\n" for i in range(4) for name in ("a", "b", "c", "d"))
    (tmp_path / "t.csv").write_text("text,label\n" + rows)
    options = ["--adapter", str(first / "adapter"), "--dataset", str(tmp_path / "t.csv"), "--learning-rate", "1e-30"]
    assert train.main([*SHORT, *options, "--quiet", "--output-dir", str(tmp_path / "run")]) == 0
    assert "with a new head: its own is for World, Sports, Business, Sci/Tech" in capsys.readouterr().out
    (_, old), (_, new) = read_adapter(first / "adapter"), read_adapter(tmp_path / "run" / "adapter")
    assert all(torch.equal(old[key], new[key]) == ("classifier.weight" not in key) for key in old if not key.endswith("bias"))


def test_a_head_without_names_is_taken_if_the_number_of_classes_fits(first, tmp_path, capsys):
    """As peft writes it."""
    shutil.copytree(first / "adapter", tmp_path / "theirs", ignore=lambda *_: {"label_names.json", "README.md"})
    options = ["--adapter", str(tmp_path / "theirs"), "--quiet", "--output-dir", str(tmp_path / "run")]
    assert train.main([*SHORT, *options]) == 0
    assert "and its head. Its 4 classes have no names: they are taken for these" in capsys.readouterr().out
    results = [json.loads((run / "results.json").read_text()) for run in (first, tmp_path / "run")]
    assert results[1]["before"] == results[0]["after"]


def test_a_stopped_run_is_resumed_from_the_same_adapter_only(first, tmp_path, capsys):
    shutil.copytree(first / "adapter", tmp_path / "theirs")
    options = [*SHORT, "--adapter", str(tmp_path / "theirs"), "--quiet", "--batch-size", "4", "--checkpoint-every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert train.main([*options, "--output-dir", str(tmp_path / "run")]) == 143
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + bytes(4))
    assert train.main(["--resume", str(tmp_path / "run")]) == 2
    assert "the adapter has changed since the run" in capsys.readouterr().err
    weights.write_bytes(content)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert train.main([*options, "--output-dir", str(tmp_path / "whole")]) == 0
    (_, resumed), (_, whole) = (read_adapter(tmp_path / run / "adapter") for run in ("run", "whole"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "4"], "--r is 4, but the adapter in ADAPTER has 3. Leave the option out"),
        (["--r", "2"], "--r is 2, but the adapter in ADAPTER has 3"),  # the default, typed
        (["--target-modules", "q_lin", "v_lin"], "--target-modules is q_lin v_lin, but the adapter in ADAPTER has k_lin"),
        (["--use-rslora"], "--use-rslora is True, but the adapter in ADAPTER has False"),
        (["--method", "head"], "--adapter needs --method lora, but --method is head"),
        (["--adapter", "missing"], "there is no folder missing"),
        (["--adapter", "MODEL"], "--adapter MODEL is a whole model. Start from it with --model MODEL"),
        (["--model", "minilm"], "the shape of base_model.model.classifier.weight is (4, 32), in the model (4, 384)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(first, base, tmp_path, options, message, capsys):
    options = [option.replace("MODEL", str(base)) for option in options]
    assert train.main([*SHORT, "--adapter", str(first), *options, "--quiet", "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message.replace("ADAPTER", str(first / "adapter")).replace("MODEL", str(base)) in error
    assert not (tmp_path / "run").exists()


def test_a_base_model_that_was_replaced_is_refused_and_another_one_is_told(first, base, tmp_path, capsys):
    shutil.copytree(first, tmp_path / "first")
    results = json.loads((first / "results.json").read_text())
    results["sha256"]["weights"] = "0" * 64
    (tmp_path / "first" / "results.json").write_text(json.dumps(results))
    options = [*SHORT, "--adapter", str(tmp_path / "first"), "--quiet", "--output-dir", str(tmp_path / "run")]
    assert train.main(options) == 2
    assert f"the weights of {base} are not those that the adapter" in capsys.readouterr().err
    (tmp_path / "moved").symlink_to(base)
    assert train.main([*options, "--model", str(tmp_path / "moved")]) == 0
    assert f"was trained on {base}; this run trains it on {tmp_path / 'moved'}" in capsys.readouterr().out


def test_compare_refuses_it(first, capsys):
    assert compare.main(["--adapter", str(first)]) == 2
    assert "--adapter is not for compare.py, which runs every method from the start" in capsys.readouterr().err
