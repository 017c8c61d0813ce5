"""A damaged, foreign or hostile adapter is refused with one line that says what to do, and the model does not change."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from helpers import adapted, base_model, layers, logits, perturb

from lora import LoraConfig, PeftModel
from lora.errors import UserError

Q_LIN = "base_model.model.distilbert.transformer.layer.0.attention.q_lin"


@pytest.fixture
def folder(tmp_path) -> Path:
    perturb(adapted()).save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def change_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path, base: torch.nn.Module | None = None) -> str:
    """The message. The adapter is loaded into a fresh model and in place of another adapter; neither may change."""
    base = base or base_model()
    before = logits(base) if base.config.vocab_size == 99 else None
    with pytest.raises(UserError) as caught:
        PeftModel.from_pretrained(base, folder)
    assert not layers(base)
    assert all(parameter.requires_grad for parameter in base.parameters())
    if before is not None:
        assert torch.equal(logits(base), before)

    name = "query" if hasattr(base, "bert") else "q_lin"
    model = perturb(adapted(base, target_modules=[name]))
    adapter = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError):
        model.load_adapter(folder)
    assert model.state_dict().keys() == adapter.keys()
    assert all(torch.equal(tensor, adapter[key]) for key, tensor in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_truncated_file(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "adapter_model.safetensors is not a whole safetensors file" in refusal(folder)


def test_a_tensor_missing(folder):
    change_tensors(folder, lambda tensors: tensors.pop(f"{Q_LIN}.lora_B.weight"))
    assert f"lacks {Q_LIN}.lora_B.weight" in refusal(folder)


def test_a_head_missing(folder):
    change_tensors(folder, lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    assert "lacks base_model.model.classifier.bias" in refusal(folder)


def test_a_tensor_too_many(folder):
    change_tensors(folder, lambda tensors: tensors.update({"foo.weight": torch.zeros(1)}))
    assert "contains foo.weight, which this model does not have" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(folder, value):
    change_tensors(folder, lambda tensors: tensors[f"{Q_LIN}.lora_A.weight"].view(-1)[5:6].fill_(value))
    assert f"{Q_LIN}.lora_A.weight contains NaN or infinity" in refusal(folder)


def test_integers(folder):
    change_tensors(folder, lambda tensors: tensors.update({f"{Q_LIN}.lora_A.weight": torch.zeros(3, 32, dtype=torch.int64)}))
    assert "contains torch.int64, not floating-point numbers" in refusal(folder)


def test_another_rank_than_configured(folder):
    change_config(folder, r=4)
    assert "lora_A.weight is (3, 32), in the model (4, 32)" in refusal(folder)


def test_another_number_of_classes(folder):
    change_tensors(folder, lambda t: t.update({key: t[key][:2].clone() for key in t if ".classifier." in key}))
    assert (
        "classifier.bias is (2,), in the model (4,). Load the base model of the adapter, with its number of classes"
        in refusal(folder)
    )


def test_another_base_model(folder):
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    wider = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**shape, num_labels=4)).eval()
    assert "is (4, 32), in the model (4, 64). Load the base model of the adapter" in refusal(folder, wider)


def test_another_kind_of_model(folder):
    expected = "Target modules ['q_lin', 'v_lin'] not found in the base model. Choose from: query"
    assert expected in refusal(folder, base_model("bert"))


def test_a_target_without_tensors(folder):
    change_config(folder, target_modules=["q_lin", "v_lin", "k_lin"])
    assert "lacks" in refusal(folder)
    assert "k_lin" in refusal(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'. Supported: LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": {}}, "init_lora_weights is {}"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"task_type": "TRANSLATION"}, "task_type is 'TRANSLATION'"),
        ({"r": 0}, "r is 0"),
        ({"r": "two"}, "r is 'two'"),
        ({"r": 1 << 60}, "r is 1152921504606846976"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_modules": []}, "Please specify `target_modules`, which is empty"),
        ({"rank_pattern": {r"([a-z_]+)+!": 2, "q_lin": 1 << 30}}, "rank_pattern['q_lin'] is 1073741824"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"target_modules": [7]}, "target_modules is [7]"),
        ({"target_modules": {"q_lin": 1}}, "target_modules is {'q_lin': 1}"),
        ({"layers_to_transform": [True]}, "layers_to_transform is [True]"),
        ({"alpha_pattern": {"q_lin": [1]}}, "alpha_pattern is {'q_lin': [1]}"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a']"),
        ({"rank_pattern": []}, "rank_pattern is []"),
        ({"rank_pattern": {"q_lin": "two"}}, "rank_pattern is {'q_lin': 'two'}. Its type must be dict[str, int]"),
        ({"rank_pattern": {"(": 2}}, "'(' is not a valid regular expression"),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"layers_to_transform": [9]}, "layers_to_transform is [9]"),
    ],
)
def test_an_option_that_is_not_supported(folder, values, message):
    """Never half obeyed: an option without a meaning here, or a value of the wrong type or range."""
    change_config(folder, **values)
    assert message in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"peft_type": "LORA", "r": NaN}', "[" * 100_000])
def test_a_damaged_configuration(folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(folder)


def test_a_pickle_is_not_opened(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    assert "adapter_model.safetensors is missing. Weights are read from safetensors files only" in refusal(folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    assert "is not a whole safetensors file" in refusal(folder)


def test_a_missing_folder_or_file(folder):
    assert "is not an adapter: adapter_config.json not found" in refusal(folder / "nowhere")
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(folder)


def test_an_adapter_that_is_not_finite_is_never_saved(tmp_path):
    model = adapted()
    model.distilbert.transformer.layer[0].attention.q_lin.lora_A.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("x" * 300, id="name too long"),
        pytest.param("a/" * 3000, id="path too long"),
        "a\0b",
        "half \ud800 a character",
        "/dev/null/below",
    ],
)
def test_an_impossible_folder_name(tmp_path, name):
    model = adapted()
    for save in (model.save_pretrained, LoraConfig().save_pretrained):
        with pytest.raises(UserError, match="cannot be written"):
            save(tmp_path / name)
    with pytest.raises(UserError, match="is not an adapter"):
        model.load_adapter(tmp_path / name)
    assert not list(tmp_path.rglob("*.*"))


def test_a_base_model_name_that_is_not_utf_8_is_kept(tmp_path):
    adapted(base_model_name_or_path="caf\udce9").save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).base_model_name_or_path == "caf\udce9"
