"""The same adapter in peft and here: logits, loss, gradients, merged weights and 20 steps of AdamW are equal, bit for bit.

A and B are perturbed strongly (`helpers.perturb`), so that a forgotten scale or layer changes far more than rounding does.
"""

import json

import peft
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from helpers import Q_V, base_model, batch, logits, perturb, trainable

from lora import NO_TARGETS, LoraConfig, PeftConfig, PeftModel, get_peft_model
from lora.adapter import adapter_tensors
from lora.layer import LoRALinear
from lora.modules_to_save import ModulesToSaveWrapper
from model import DistilBertConfig, DistilBertForSequenceClassification, load_pretrained, save_pretrained

DISTILBERT = {
    "r=2": {"r": 2, "lora_alpha": 16},
    "r=3, a scale that is not a power of two": {"r": 3, "lora_alpha": 16},
    "q, k, v, out": {"r": 3, "target_modules": ["q_lin", "k_lin", "v_lin", "out_lin"]},
    "all-linear": {"r": 3, "target_modules": "all-linear", "modules_to_save": ["pre_classifier", "classifier"]},
    "regular expression": {"r": 3, "target_modules": r".*\.layer\.1\.attention\.(k|v)_lin"},
    "rsLoRA": {"r": 3, "lora_alpha": 16, "use_rslora": True},
    "DoRA": {"r": 3, "lora_alpha": 16, "use_dora": True},
    "DoRA and rsLoRA": {"r": 2, "lora_alpha": 7, "use_dora": True, "use_rslora": True, "target_modules": ["lin1", "v_lin"]},
    "bias all": {"r": 3, "bias": "all"},
    "bias lora_only": {"r": 3, "bias": "lora_only"},
    "gaussian": {"r": 3, "init_lora_weights": "gaussian"},
    "init False": {"r": 3, "init_lora_weights": False},
    "patterns": {"r": 2, "rank_pattern": {"q_lin": 4, "layer.1.attention.v_lin": 3}, "alpha_pattern": {"q_lin": 32}},
    "one layer": {"r": 3, "layers_to_transform": [1]},
    "the head alone": {"r": 3, "target_modules": NO_TARGETS},
    "a LayerNorm is trained": {"r": 3, "modules_to_save": ["sa_layer_norm"]},
}
BERT = {
    "r=3": {"r": 3, "lora_alpha": 16, "target_modules": ["query", "value"]},
    "DoRA": {"r": 3, "use_dora": True, "target_modules": ["query", "value"]},
    "bias all": {"r": 2, "bias": "all", "target_modules": ["query", "dense"]},
}
CASES = [("distilbert", options) for options in DISTILBERT.values()] + [("bert", options) for options in BERT.values()]
NAMES = [f"distilbert: {name}" for name in DISTILBERT] + [f"bert: {name}" for name in BERT]
each_configuration = pytest.mark.parametrize(("kind", "options"), CASES, ids=NAMES)


def with_defaults(options: dict) -> dict:
    return {"task_type": "SEQ_CLS", "target_modules": Q_V} | options


def pair(kind: str, options: dict, folder, dropout: float = 0.0) -> tuple[peft.PeftModel, PeftModel]:
    """The same perturbed adapter in peft and here, loaded from peft's files."""
    options = with_defaults(options) | {"lora_dropout": dropout}
    theirs = peft.get_peft_model(base_model(kind, dropout), peft.LoraConfig(**options))
    perturb(theirs)
    theirs.save_pretrained(folder)
    return theirs, PeftModel.from_pretrained(base_model(kind, dropout), folder, is_trainable=True)


def their_parameters(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """What peft trains, under the keys of its files."""
    names: dict[str, torch.nn.Parameter] = trainable(model)
    for part, instead in ((".modules_to_save.default", ""), ("vector.default.weight", "vector"), (".default", "")):
        names = {name.replace(part, instead): parameter for name, parameter in names.items()}
    return names


def our_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What is trained here, under the same keys."""
    names = {}
    for name, parameter in model.base_model.named_parameters():
        parent = model.base_model.get_submodule(name.rpartition(".")[0])
        if parameter.requires_grad:
            if isinstance(parent, LoRALinear) and name.endswith(".bias"):
                name = name.removesuffix("bias") + "base_layer.bias"
            names["base_model.model." + name.replace(".trained_module", "")] = parameter
    return names


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), f"{key} differs by {(ours[key] - theirs[key]).abs().max()}"


def gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {key: parameter.grad for key, parameter in parameters.items()}


@each_configuration
def test_logits_loss_and_gradients_are_equal(kind, options, tmp_path):
    theirs, ours = pair(kind, options, tmp_path)
    base = base_model(kind)
    assert torch.equal(logits(ours), logits(theirs))
    assert (logits(ours) - logits(base)).abs().max() > 0.05
    losses = [model.train()(**batch()).loss for model in (theirs, ours)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert_equal(gradients(our_parameters(ours)), gradients(their_parameters(theirs)))
    assert all(gradient.any() for name, gradient in gradients(our_parameters(ours)).items() if "lora_" in name)


@each_configuration
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["dropout off", "dropout on"])
def test_20_steps_of_adamw_are_equal(kind, options, dropout, tmp_path):
    theirs, ours = pair(kind, options, tmp_path, dropout)
    before = {key: tensor.clone() for key, tensor in adapter_tensors(ours.base_model).items()}
    for model, parameters in ((theirs, their_parameters(theirs)), (ours, our_parameters(ours))):
        optimizer = torch.optim.AdamW([parameters[key] for key in sorted(parameters)], lr=1e-2)
        model.train()
        torch.manual_seed(3)
        for _ in range(20):
            model(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(our_parameters(ours), their_parameters(theirs))
    assert all((tensor - before[key]).abs().max() > 0 for key, tensor in our_parameters(ours).items())


@each_configuration
def test_merged_weights_are_equal(kind, options, tmp_path):
    theirs, ours = pair(kind, options, tmp_path)
    before = logits(ours)
    merged = ours.merge_and_unload()
    assert_equal(merged.state_dict(), theirs.merge_and_unload().state_dict())
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)


@each_configuration
def test_our_files_load_in_peft_and_return(kind, options, tmp_path):
    torch.manual_seed(4)
    ours = get_peft_model(base_model(kind), LoraConfig(**with_defaults(options)))
    perturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base_model(kind), tmp_path / "ours")
    assert torch.equal(logits(theirs), logits(ours))

    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(base_model(kind), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))
    again.save_pretrained(tmp_path / "again")
    first, second = (safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again"))
    assert_equal(second, first)


def test_files_of_peft_load_here_and_return(tmp_path):
    theirs, ours = pair("distilbert", DISTILBERT["DoRA"], tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base_model(), tmp_path / "ours")
    assert torch.equal(logits(back), logits(theirs))
    assert_equal(*(safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")))


@pytest.mark.parametrize("options", DISTILBERT.values(), ids=DISTILBERT)
def test_our_own_distilbert_is_equal_to_1e_5(options, tmp_path):
    """Logits and gradients. Its last layer computes a single row, so products are summed in another order."""
    theirs, _ = pair("distilbert", options, tmp_path)
    config = DistilBertConfig(
        vocab_size=99, max_position_embeddings=40, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=4, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    base = DistilBertForSequenceClassification(config)
    base.load_state_dict(base_model().state_dict())
    ours = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    inputs = batch()
    labels = inputs.pop("labels")

    outputs = ours(**inputs)
    torch.testing.assert_close(outputs, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
    F.cross_entropy(outputs, labels).backward()
    theirs(**inputs, labels=labels).loss.backward()
    mine, expected = our_parameters(ours), their_parameters(theirs)
    assert mine.keys() == expected.keys()
    for key, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, expected[key].grad, atol=1e-5, rtol=1e-4, msg=key)


def test_the_real_minilm_encoder_is_equal(tmp_path):
    """Logits and gradients, as transformers loads the encoder from our export; our own network is equal to 1e-5."""
    base, tokenizer = load_pretrained("minilm", 4)
    save_pretrained(base, tokenizer, tmp_path / "base")
    models = [transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base") for _ in range(2)]
    options = with_defaults({"r": 3, "lora_alpha": 16})
    theirs = peft.get_peft_model(models[0].eval(), peft.LoraConfig(**options))
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = PeftModel.from_pretrained(models[1].eval(), tmp_path / "adapter", is_trainable=True).eval()

    text = "Oil prices rose on Monday after a storm closed wells in the Gulf."
    inputs = {"input_ids": torch.tensor([tokenizer.encode(text).ids]), "labels": torch.tensor([2])}
    outputs = [model(**inputs) for model in (theirs, ours)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    gradients = [
        {key: p.grad for key, p in parameters.items()} for parameters in (our_parameters(ours), their_parameters(theirs))
    ]
    assert_equal(*gradients)

    own = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = outputs[0].logits.detach()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(own(inputs["input_ids"]), expected, atol=1e-5, rtol=0)


def test_the_files_are_the_same_bytes_every_time(tmp_path):
    """The configuration holds, sorted, the keys that every version of peft knows; the weights are float32."""
    for name in ("one", "two"):
        torch.manual_seed(0)
        model = get_peft_model(base_model(), LoraConfig(r=2, lora_alpha=16, target_modules=["v_lin", "q_lin"]))
        model.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert config == {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": None, "revision": None, "bias": "none",
        "r": 2, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_lin", "v_lin"],
        "modules_to_save": ["classifier", "pre_classifier"], "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    assert PeftConfig.from_pretrained(tmp_path / "one").target_modules == ["q_lin", "v_lin"]
    with safetensors.safe_open(tmp_path / "one" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118 - not a dict
    LoraConfig(init_lora_weights="gaussian").save_pretrained(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["init_lora_weights"] is True


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_merged_or_disabled_the_saved_bytes_are_the_same(tmp_path, bias):
    model = get_peft_model(base_model(), LoraConfig(r=3, target_modules=["q_lin", "v_lin"], bias=bias))
    perturb(model)
    model.save_pretrained(tmp_path / "plain")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    expected = (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    assert all((tmp_path / name / "adapter_model.safetensors").read_bytes() == expected for name in ("disabled", "merged"))


def test_one_base_model_serves_many_adapters(tmp_path):
    """Its weights are neither copied nor loaded again, and unloading restores them."""
    options = {
        "first": {"r": 2},
        "second": {"r": 3, "use_dora": True, "target_modules": ["k_lin"]},
        "third": {"r": 3, "bias": "all"},
    }
    expected = {}
    for name, config in options.items():
        theirs, _ = pair("distilbert", config, tmp_path / name)
        expected[name] = logits(theirs)
    base = base_model()
    untouched = logits(base)
    embeddings = base.distilbert.embeddings.word_embeddings.weight
    model = PeftModel.from_pretrained(base, tmp_path / "first")
    for name in ("second", "third", "first", "second"):
        model.load_adapter(tmp_path / name)
        assert torch.equal(logits(model), expected[name]), name
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.distilbert.embeddings.word_embeddings.weight is embeddings
    assert torch.equal(logits(model.unload()), untouched)
    assert not any(isinstance(module, LoRALinear | ModulesToSaveWrapper) for module in base.modules())
