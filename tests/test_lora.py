"""LoRA in a whole model: what is trained and counted, and how it is disabled, merged and unloaded."""

import copy
import re

import peft
import pytest
import torch
import transformers
from helpers import Q_V, adapted, base_model, batch, logits, perturb, trainable

from lora import LoraConfig, LoRALinear, get_peft_model
from lora.errors import UserError
from lora.modules_to_save import ModulesToSaveWrapper
from model import DistilBertConfig, DistilBertForSequenceClassification

ALL_LINEAR = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]


def full_size() -> DistilBertForSequenceClassification:
    """DistilBERT without its data."""
    with torch.device("meta"):
        return DistilBertForSequenceClassification(DistilBertConfig(num_labels=4))


def test_the_experiment_trains_630_532_parameters(capsys):
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
        {"r": 2, "target_modules": Q_V, "modules_to_save": ["layer_norm"]},
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
    if options["target_modules"] == "all-linear":  # peft 0.21 needs the head of DistilBERT spelled out here
        reference["modules_to_save"] = ["pre_classifier", "classifier"]
    expected = peft.get_peft_model(theirs, peft.LoraConfig(**reference)).get_nb_trainable_parameters()
    assert get_peft_model(full_size(), LoraConfig(**options)).get_nb_trainable_parameters() == expected
    assert get_peft_model(theirs_too, LoraConfig(**options)).get_nb_trainable_parameters() == expected


def test_only_adapters_and_head_are_trainable():
    """And the encoder's tensors keep their names."""
    base = base_model()
    names = set(base.state_dict())
    model = adapted(base)
    assert set(trainable(base)) == {
        f"distilbert.transformer.layer.{i}.attention.{linear}.lora_{matrix}.weight"
        for i in (0, 1)
        for linear in Q_V
        for matrix in "AB"
    } | {f"{head}.trained_module.{kind}" for head in ("pre_classifier", "classifier") for kind in ("weight", "bias")}
    encoder = {name for name in names if "classifier" not in name}
    assert encoder <= set(model.base_model.state_dict())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_disabled_or_unloaded_it_is_exactly_the_base_model(bias):
    """Trained biases are restored too, where peft only warns. The block can be nested, or left by an exception."""
    base = base_model()
    expected = logits(base)
    model = adapted(base, bias=bias)
    assert torch.equal(logits(model), expected)  # B is zero

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
    original = base_model().state_dict()
    assert base.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_merged_model_is_plain_and_answers_the_same(bias):
    model = perturb(adapted(bias=bias))
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=5e-5, rtol=0)
    assert not any(isinstance(module, LoRALinear | ModulesToSaveWrapper) for module in merged.modules())
    assert set(merged.state_dict()) == set(base_model().state_dict())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_costs_only_rounding(dtype, tolerance, use_dora):
    torch.manual_seed(0)
    layer = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 64)).to(dtype),
        LoraConfig(r=3, lora_alpha=3, target_modules=["0"], task_type=None, use_dora=use_dora),
    ).base_model[0]
    torch.nn.init.normal_(layer.lora_B.weight, std=0.5)
    x = torch.randn(100, 64, dtype=dtype)
    before, plain = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert (before - plain).abs().max() > 20 * tolerance  # the update is much larger than that
    layer.merge()
    torch.testing.assert_close(layer(x), before, atol=tolerance, rtol=0)
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_merging_is_idempotent_and_unmerging_exact():
    model = perturb(adapted())
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


def test_a_merged_model_can_be_disabled():
    """Within the block it is the base model, and afterwards it is merged again."""
    base = base_model()
    expected = logits(base)
    model = perturb(adapted(base))
    model.merge_adapter()
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), merged)
    assert model.distilbert.transformer.layer[0].attention.q_lin.merged


def test_a_merge_that_is_not_finite_changes_no_weight():
    model = perturb(adapted())
    model.distilbert.transformer.layer[1].attention.v_lin.lora_B.weight.data[0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="not finite"):
        model.merge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_new_layers_keep_the_mode_and_are_float32():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = adapted(base_model().to(dtype), lora_dropout=0.5)
        assert not any(module.training for module in model.base_model.modules())
        assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
        assert logits(perturb(model)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_inference_mode_leaves_the_model_trainable(dtype, use_dora):
    """LoRA can be added, merged, disabled and removed in inference mode, and the model trained afterwards."""

    def train(model: torch.nn.Module) -> None:
        model(batch()["input_ids"]).logits.sum().backward()
        assert not any(parameter.is_inference() for parameter in model.parameters())

    base = base_model().to(dtype)
    with torch.inference_mode():
        model = adapted(base, use_dora=use_dora)
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


def test_adding_lora_twice_is_refused():
    base = base_model()
    adapted(base)
    with pytest.raises(UserError, match="contains LoRA already"):
        adapted(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_lin", "query"]}, "named 'query'. Choose from: q_lin, k_lin, v_lin, out_lin, lin1, lin2"),
        ({"target_modules": "q_lin"}, "Target modules 'q_lin' not found"),  # a string is a regular expression for full names
        ({"target_modules": "(q_lin"}, "'(q_lin' is not a valid regular expression"),
        ({"target_modules": "a{99999999999}"}, "not a valid regular expression"),
        ({"target_modules": []}, "Please specify `target_modules`, which is empty. Choose from: q_lin"),
        ({"target_modules": ["word_embeddings"]}, "is of type Embedding"),
        (
            {"target_modules": ["pre_classifier"]},
            "All modules were excluded, or are part of modules_to_save (the trained head)",
        ),
        ({"target_modules": ["q_lin"], "exclude_modules": ".*"}, "All modules were excluded"),
        (
            {"rank_pattern": {"q_lin": 2, "query": 2}},
            "rank_pattern: no target module is named 'query'. Choose from: q_lin, v_lin",
        ),
        ({"alpha_pattern": {"k_lin": 2}}, "alpha_pattern: no target module is named 'k_lin'"),
        ({"rank_pattern": {"(" * 5000: 2}}, "not a valid regular expression"),
        ({"alpha_pattern": {"(?i)q_lin": 2}}, "not a valid regular expression"),  # it becomes a part of another
        ({"exclude_modules": "(q_lin"}, "exclude_modules: '(q_lin' is not a valid regular expression"),
        ({"layers_pattern": "(layer", "layers_to_transform": 1}, "not a valid regular expression"),
        ({"modules_to_save": ["pooler"]}, "no module is named 'pooler'"),
        ({"layers_to_transform": [9]}, "layers_to_transform is [9]. Choose from: q_lin"),
    ],
)
def test_a_bad_target_is_refused_and_the_model_unchanged(options, message):
    base = base_model()
    before = logits(base)
    with pytest.raises(UserError, match=re.escape(message)):
        adapted(base, **options)
    assert not any(isinstance(module, LoRALinear) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is 0. It must be at least 1 and below 1e+06"),
        ({"r": 2.0}, "r is 2.0. Its type must be int"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e+300"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"bias": "some"}, "bias is 'some'. Supported: none, all, lora_only"),
        ({"task_type": "TRANSLATION"}, "task_type is 'TRANSLATION'. Supported: SEQ_CLS, "),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'. Supported: LORA"),
        ({"layers_pattern": "layer"}, "`layers_to_transform` must also be specified"),
        ({"use_dora": "no"}, "use_dora is 'no'. Its type must be bool"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'. Its type must be list[int] | int | None"),
        ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'"),
        ({"rank_pattern": None}, "rank_pattern is None"),
        ({"rank_pattern": {"q_lin": 0}}, "rank_pattern['q_lin'] is 0"),
        ({"alpha_pattern": {"q_lin": "2"}}, "Its type must be dict[str, float]"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        LoraConfig(**options)
