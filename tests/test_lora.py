"""LoRA in a model: what is adapted, what is trained, what is counted, and how it is switched off, merged and taken out."""

import copy

import peft
import pytest
import torch
import transformers

from common.errors import UserError
from lora import LoraConfig, LoRALinear, get_peft_model
from lora.inject import ModulesToSaveWrapper
from model import DistilBertConfig, DistilBertForSequenceClassification

Q_V = ["q_lin", "v_lin"]
ALL_LINEAR = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]


def full_size() -> DistilBertForSequenceClassification:
    with torch.device("meta"):
        return DistilBertForSequenceClassification(DistilBertConfig(num_labels=4))


def tiny(**config) -> transformers.DistilBertForSequenceClassification:
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "max_position_embeddings": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**shape, num_labels=4, **config)
    ).eval()


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Trained, as far as a test can tell: every trainable tensor moved, A and B by so much that LoRA matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=1.0 if "lora_" in name else 0.05)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    input_ids = torch.arange(5, 65).reshape(4, 15)
    with torch.no_grad():
        output = model(input_ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def test_the_experiment_trains_630_532_of_67_587_080_parameters(capsys):
    model = get_peft_model(full_size(), LoraConfig(r=2, lora_alpha=16, lora_dropout=0.1, target_modules=Q_V))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 630,532 || all params: 67,587,080 || trainable%: 0.9329\n"


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "target_modules": Q_V},
        {"r": 1, "target_modules": ["q_lin"]},
        {"r": 16, "target_modules": Q_V},
        {"r": 3, "target_modules": ["q_lin", "k_lin", "v_lin", "out_lin"]},
        {"r": 2, "target_modules": ALL_LINEAR},
        {"r": 4, "target_modules": r".*\.layer\.[024]\.attention\.(q|k)_lin"},
        {"r": 2, "target_modules": "all-linear"},
        {"r": 2, "target_modules": Q_V, "bias": "all"},
        {"r": 2, "target_modules": Q_V, "bias": "lora_only"},
        {"r": 2, "target_modules": Q_V, "modules_to_save": ["sa_layer_norm"]},
        {"r": 2, "target_modules": Q_V, "task_type": None},
    ],
    ids=lambda options: ", ".join(str(value) for value in options.values()),
)
def test_parameters_are_counted_as_peft_counts_them(options):
    with torch.device("meta"):
        config = transformers.DistilBertConfig(num_labels=4)
        theirs = transformers.DistilBertForSequenceClassification(config)
        theirs_too = transformers.DistilBertForSequenceClassification(config)
    reference = {"task_type": "SEQ_CLS"} | options
    if options["target_modules"] == "all-linear":  # peft 0.21 cannot do this to DistilBERT unless the head is spelled out
        reference["modules_to_save"] = ["pre_classifier", "classifier"]
    expected = peft.get_peft_model(theirs, peft.LoraConfig(**reference)).get_nb_trainable_parameters()
    assert get_peft_model(full_size(), LoraConfig(**options)).get_nb_trainable_parameters() == expected
    assert get_peft_model(theirs_too, LoraConfig(**options)).get_nb_trainable_parameters() == expected


def test_only_adapters_and_head_are_trainable_and_each_name_of_the_base_is_kept():
    base = tiny()
    names = set(base.state_dict())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=Q_V))
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"distilbert.transformer.layer.{i}.attention.{linear}.lora_{matrix}.weight"
        for i in (0, 1)
        for linear in Q_V
        for matrix in "AB"
    } | {f"{head}.trained_module.{kind}" for head in ("pre_classifier", "classifier") for kind in ("weight", "bias")}
    encoder = {name for name in names if "classifier" not in name}
    assert encoder <= set(model.base_model.state_dict())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_switched_off_it_is_the_base_model_exactly_after_training_too(bias):
    base = tiny()
    expected = logits(base)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=16, target_modules=Q_V, bias=bias))
    fresh = logits(model)
    assert torch.equal(fresh, expected)  # B is zero

    trained = logits(perturb(model))
    assert (trained - expected).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), trained)
    with pytest.raises(RuntimeError, match="in the block"), model.disable_adapter():
        raise RuntimeError("in the block")
    assert torch.equal(logits(model), trained)

    assert model.unload() is base
    assert torch.equal(logits(base), expected)
    assert set(base.state_dict()) == set(tiny().state_dict())
    assert all(torch.equal(tensor, tiny().state_dict()[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_merged_it_gives_the_same_logits_and_is_a_plain_model_again(bias):
    model = perturb(get_peft_model(tiny(), LoraConfig(r=3, lora_alpha=16, target_modules=Q_V, bias=bias)))
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=2e-6, rtol=0)
    assert not any(isinstance(module, LoRALinear | ModulesToSaveWrapper) for module in merged.modules())
    assert set(merged.state_dict()) == set(tiny().state_dict())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_costs_rounding_only_a_few_digits_in_float32_and_more_in_bfloat16(dtype, tolerance, use_dora):
    torch.manual_seed(0)
    layer = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 64)).to(dtype),
        LoraConfig(r=3, lora_alpha=3, target_modules=["0"], task_type=None, use_dora=use_dora),
    ).base_model[0]
    torch.nn.init.normal_(layer.lora_B.weight, std=0.5)
    x = torch.randn(100, 64, dtype=dtype)
    before, plain = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert (before - plain).abs().max() > 20 * tolerance  # what is merged is no trifle
    layer.merge()
    torch.testing.assert_close(layer(x), before, atol=tolerance, rtol=0)
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_merging_three_times_is_merging_once_and_unmerging_gives_back_the_weights_bit_for_bit():
    model = perturb(get_peft_model(tiny(), LoraConfig(r=3, lora_alpha=16, target_modules=Q_V)))
    before = copy.deepcopy(model.state_dict())
    unmerged_logits = logits(model)
    model.merge_adapter()
    once = logits(model)
    assert not torch.equal(
        model.distilbert.transformer.layer[0].attention.q_lin.weight,
        before["base_model.distilbert.transformer.layer.0.attention.q_lin.weight"],
    )
    model.merge_adapter()
    model.merge_adapter()
    assert torch.equal(logits(model), once)
    model.unmerge_adapter()
    assert torch.equal(logits(model), unmerged_logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_switched_off_while_merged_it_is_the_base_model_and_merged_again_after():
    base = tiny()
    expected = logits(base)
    model = perturb(get_peft_model(base, LoraConfig(r=3, target_modules=Q_V)))
    model.merge_adapter()
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), merged)
    assert model.distilbert.transformer.layer[0].attention.q_lin.merged


def test_a_merge_that_is_not_finite_is_refused_and_every_weight_left_alone():
    model = perturb(get_peft_model(tiny(), LoraConfig(r=2, target_modules=Q_V)))
    model.distilbert.transformer.layer[1].attention.v_lin.lora_B.weight.data[0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="not finite"):
        model.merge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_new_layers_are_in_the_mode_of_those_they_replace_and_float32_over_any_weight():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = get_peft_model(tiny().to(dtype), LoraConfig(r=2, lora_dropout=0.5, target_modules=Q_V))
        assert not any(module.training for module in model.base_model.modules())
        assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
        assert logits(perturb(model)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_is_done_under_inference_mode_can_be_trained_afterwards(dtype, use_dora):
    def train(model: torch.nn.Module) -> None:
        model(torch.arange(5, 65).reshape(4, 15)).logits.sum().backward()
        assert not any(parameter.is_inference() for parameter in model.parameters())

    base = tiny().to(dtype)
    with torch.inference_mode():
        model = get_peft_model(base, LoraConfig(r=2, target_modules=Q_V, use_dora=use_dora))
    train(perturb(model))
    with torch.inference_mode():
        model.merge_adapter()
        with model.disable_adapter():
            pass
        model.unmerge_adapter()
    train(model)
    with torch.inference_mode():
        merged = model.merge_and_unload()
    train(merged.requires_grad_(True))


def test_putting_lora_in_twice_is_refused():
    base = tiny()
    get_peft_model(base, LoraConfig(r=2, target_modules=Q_V))
    with pytest.raises(UserError, match="already"):
        get_peft_model(base, LoraConfig(r=2, target_modules=Q_V))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_lin", "query"]}, "'query'; there are: q_lin, k_lin, v_lin, out_lin, lin1, lin2"),
        ({"target_modules": "q_lin"}, "matches no layer"),  # a string is a regular expression over whole names
        ({"target_modules": "(q_lin"}, "no regular expression"),
        ({"target_modules": "a{99999999999}"}, "no regular expression"),
        ({"target_modules": Q_V, "rank_pattern": {"(" * 5000: 2}}, "no regular expression"),
        ({"target_modules": Q_V, "alpha_pattern": {"(?i)q_lin": 2}}, "no regular expression"),  # it stands within another
        ({"target_modules": None}, "target_modules is empty; it can name any of: q_lin"),
        ({"target_modules": ["word_embeddings"]}, "is of type Embedding"),
        ({"target_modules": ["pre_classifier"]}, "trained in full already"),
        ({"target_modules": Q_V, "modules_to_save": ["pooler"]}, "no module is called 'pooler'"),
        ({"target_modules": Q_V, "r": 0}, "r is 0"),
        ({"target_modules": Q_V, "r": 2.0}, "r is 2.0"),
        ({"target_modules": Q_V, "lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"target_modules": Q_V, "lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"target_modules": Q_V, "bias": "some"}, "none, all or lora_only"),
        ({"target_modules": Q_V, "task_type": "CAUSAL_LM"}, "SEQ_CLS only"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_the_model_left_alone(options, message):
    base = tiny()
    before = logits(base)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        get_peft_model(base, LoraConfig(**options))
    assert not any(isinstance(module, LoRALinear) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(base), before)
