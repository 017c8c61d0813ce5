"""What peft's own tests ask of LoRA, asked here: how adapters start, scale, are found, trained, loaded and left out."""

import json
import math
import warnings

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_target_module_exists
from test_parity import base_model, batch, logits, perturb
from torch import nn

from common.errors import UserError
from lora import LoraConfig, LoRALinear, PeftModel, TaskType, get_peft_model
from lora.adapter import adapter_tensors
from lora.targets import find_targets, pattern_value
from lora.variants import DoRALinear
from training.optimizer import parameter_groups

Q_V = ["q_lin", "v_lin"]


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def wide(**options) -> LoRALinear:
    """LoRA beside one layer so wide that its random numbers show how they were drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 1000))
    config = {"r": 100, "target_modules": ["0"], "task_type": None} | options
    return get_peft_model(model, LoraConfig(**config)).base_model[0]


def adapted(**options) -> PeftModel:
    return get_peft_model(base_model("distilbert"), LoraConfig(**({"r": 3, "lora_alpha": 16, "target_modules": Q_V} | options)))


# How an adapter starts


def test_A_starts_uniform_within_one_over_the_root_of_d_in_and_B_at_zero():
    layer = wide()
    A, bound = layer.lora_A.weight.detach(), 1 / math.sqrt(1000)
    assert A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of the uniform distribution
    assert (A.abs() > 0.9 * bound).float().mean() == pytest.approx(0.1, abs=0.01)  # a normal one would have fewer out there
    assert not layer.lora_B.weight.any()


def test_gaussian_A_starts_normal_with_deviation_one_over_r_and_B_at_zero():
    layer = wide(init_lora_weights="gaussian")
    A = layer.lora_A.weight.detach()
    assert A.std() == pytest.approx(0.01, rel=0.02)
    assert (A.abs() > 0.02).float().mean() == pytest.approx(0.0455, abs=0.005)
    assert not layer.lora_B.weight.any()


def test_init_false_starts_with_a_B_that_is_not_zero():
    layer = wide(init_lora_weights=False)
    assert layer.lora_B.weight.detach().std() == pytest.approx(1 / math.sqrt(300), rel=0.02)
    assert layer.delta_weight().abs().max() > 1e-3


def test_the_first_gradient_of_A_is_exactly_zero_because_B_is_and_that_of_B_is_not():
    model = adapted().train()
    model(**batch()).loss.backward()
    for layer in layers(model).values():
        assert not layer.lora_A.weight.grad.any()
        assert layer.lora_B.weight.grad.any()


# How much it counts


def test_the_scale_is_alpha_over_r_and_with_rslora_alpha_over_the_root_of_r():
    assert wide(r=4, lora_alpha=10).scaling == 2.5
    assert wide(r=4, lora_alpha=10, use_rslora=True).scaling == 5.0
    layer = wide(r=4, lora_alpha=10)
    nn.init.ones_(layer.lora_B.weight)
    x = torch.randn(3, 1000)
    expected = x @ layer.weight.T + layer.bias + 2.5 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer.eval()(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_layer_scales_by_the_rank_and_alpha_of_its_own(use_rslora):
    patterns = {"rank_pattern": {"q_lin": 8, "layer.1.attention.v_lin": 4}, "alpha_pattern": {"v_lin": 9}}
    options = {"r": 3, "lora_alpha": 6, "target_modules": Q_V, "use_rslora": use_rslora, **patterns}
    ours = get_peft_model(base_model("distilbert"), LoraConfig(**options))
    theirs = peft.get_peft_model(base_model("distilbert"), peft.LoraConfig(task_type="SEQ_CLS", **options))
    for name, layer in layers(ours.base_model).items():
        reference = theirs.base_model.model.get_submodule(name)
        assert (layer.lora_A.out_features, layer.scaling) == (reference.r["default"], reference.scaling["default"]), name
    assert len({layer.scaling for layer in layers(ours).values()}) == 3


def test_a_rank_pattern_that_says_what_holds_anyway_changes_no_scale():
    plain, redundant = (adapted(alpha_pattern={"q_lin": 5}, rank_pattern=pattern) for pattern in ({}, {"q_lin": 3}))
    assert [a.scaling for a in layers(plain).values()] == [b.scaling for b in layers(redundant).values()]


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        ({"q_lin": 1}, "layer.0.q_lin", 1),
        ({"q_lin": 1}, "layer.0.xq_lin", 0),  # a suffix at a dot only
        ({"0.q_lin": 1, "q_lin": 2}, "layer.0.q_lin", 1),  # the first hit
        ({"q_lin": 2, "0.q_lin": 1}, "layer.0.q_lin", 2),
        ({"^q_lin": 1}, "layer.0.q_lin", 0),  # anchored, it cannot stand behind a dot ...
        ({"^layer.0.q_lin": 1}, "layer.0.q_lin", 1),  # ... and is met by the whole name
        (dict.fromkeys(["nothing", "at_all"], 1), "layer.0.q_lin", 0),
        ({r"layer\.[02].*": 1}, "model.layer.2.q_lin", 1),
        ({"layer.0": 1}, "layer.0.q_lin", 0),  # to the end of the name
    ],
)
def test_a_pattern_is_matched_to_the_end_of_a_name_from_any_dot_and_the_first_hit_wins(patterns, name, expected):
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(patterns.keys(), name)
    assert pattern_value(patterns, name, 0) == patterns.get(key, 0)
    assert pattern_value(patterns, name, 0) == expected


def test_with_the_scale_at_zero_the_output_is_that_of_the_base():
    model = adapted(task_type=None)
    perturb(model)
    expected = logits(base_model("distilbert"))
    assert not torch.allclose(logits(model), expected, atol=0.01)
    for layer in layers(model).values():
        layer.scaling = 0.0
    assert torch.equal(logits(model), expected)


# What is adapted


def stack() -> nn.Module:
    """Names as they occur in the wild: layers, experts with numbers of their own, and ends that are ends of others."""

    def block() -> nn.ModuleDict:
        experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(3))
        return nn.ModuleDict({"q": nn.Linear(2, 2), "xq": nn.Linear(2, 2), "experts": experts})

    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(3))}), "q": nn.Linear(2, 2)})


LISTS = [
    ["q"],
    ["xq"],
    ["up"],
    ["q", "up"],
    ["layers.1.q"],
    ["1.up"],
    ["model.layers.0.q"],
    ["experts.0.up", "model.layers.2.q"],
]
EXPRESSIONS = [r".*\.q", r"model\.layers\.[01]\..*q", r".*experts\.[02]\.up", "q", r"(.*\.)?q", r"model\.layers\.0"]


@pytest.mark.parametrize(
    ("wanted", "layers_to_transform"),
    [(wanted, layers) for wanted in LISTS for layers in (None, 0, [1], [0, 2])] + [(wanted, None) for wanted in EXPRESSIONS],
)
def test_targets_and_layers_are_found_as_peft_finds_them(wanted, layers_to_transform):
    model = stack()
    options = {"target_modules": wanted, "layers_to_transform": layers_to_transform}
    reference = peft.LoraConfig(**options)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = [name for name in linear if check_target_module_exists(reference, name)]
    if expected:
        assert find_targets(model, LoraConfig(task_type=None, **options), []) == expected
    else:
        with pytest.raises(UserError):
            find_targets(model, LoraConfig(task_type=None, **options), [])


def test_layers_to_transform_holds_for_names_that_a_regular_expression_spells_out():
    both = "model.layers.0.q|model.layers.1.q"
    config = LoraConfig(target_modules=both, layers_to_transform=[0], task_type=None)
    assert find_targets(stack(), config, []) == ["model.layers.0.q"]


def test_the_number_of_a_layer_is_the_first_in_its_name_and_not_that_of_an_expert():
    config = LoraConfig(target_modules=["up"], layers_to_transform=[1], task_type=None)
    assert find_targets(stack(), config, []) == [f"model.layers.1.experts.{expert}.up" for expert in range(3)]


def test_layers_to_transform_trains_fewer_tensors_and_loads_again_equal(tmp_path):
    model = adapted(layers_to_transform=[0], task_type=None)
    perturb(model)
    assert len(adapter_tensors(model.base_model)) == 4
    assert len(adapter_tensors(adapted(task_type=None).base_model)) == 8
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("distilbert"), tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_all_linear_never_adapts_the_head(kind):
    model = get_peft_model(base_model(kind), LoraConfig(r=2, target_modules="all-linear"))
    linear = [name for name, module in base_model(kind).named_modules() if isinstance(module, nn.Linear)]
    assert list(layers(model.base_model)) == [name for name in linear if not name.endswith("classifier")]
    assert len(layers(model)) > 10


def test_exactly_the_named_layers_are_adapted():
    prefix = "distilbert.transformer.layer"
    assert list(layers(adapted(target_modules=["v_lin", "q_lin"]).base_model)) == [
        f"{prefix}.{i}.attention.{name}" for i in (0, 1) for name in Q_V
    ]


# What is trained


def test_with_labels_the_loss_is_the_cross_entropy_of_the_logits():
    model = adapted()
    perturb(model)
    inputs = batch()
    output = model(**inputs)
    assert torch.equal(output.loss, F.cross_entropy(output.logits, inputs["labels"]))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_training_moves_every_trainable_tensor_and_not_a_bit_of_the_base(options):
    model = adapted(**options).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_a_loaded_adapter_trains_nothing_or_exactly_what_was_trained_if_asked(tmp_path):
    model = adapted(lora_dropout=0.5)
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(base_model("distilbert"), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.modules())
    again = PeftModel.from_pretrained(base_model("distilbert"), tmp_path, is_trainable=True)
    trainable = [{name for name, parameter in m.named_parameters() if parameter.requires_grad} for m in (model, again)]
    assert trainable[0] == trainable[1]
    with pytest.raises(UserError, match="is_trainable=True"):
        parameter_groups(frozen, 1e-3, 1.0)


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_trained_biases_are_switched_off_too_where_peft_can_only_warn_that_they_are_not(kind):
    expected = logits(base_model("distilbert"))
    model = adapted(bias=kind)
    perturb(model)
    theirs = peft.get_peft_model(
        base_model("distilbert"), peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=Q_V, bias=kind)
    )
    perturb(theirs)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with theirs.disable_adapter():
            assert not torch.equal(logits(theirs), expected)


def test_loraplus_lets_B_learn_faster_and_nothing_else():
    model = adapted()
    groups = parameter_groups(model, 1e-3, 16.0)
    rates = {id(parameter): group["initial_lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (16e-3 if name.endswith("lora_B.weight") else 1e-3), name
    assert not rates
    assert {group["initial_lr"] for group in parameter_groups(model, 1e-3, 1.0)} == {1e-3}
    assert sum(len(group["params"]) for group in parameter_groups(model, 1e-3, 1.0)) == 12


# DoRA


def test_dora_changes_nothing_at_the_start_and_is_the_base_when_switched_off():
    expected = logits(base_model("distilbert"))
    model = adapted(use_dora=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    for layer in layers(model).values():
        assert isinstance(layer, DoRALinear)
        assert torch.equal(layer.lora_magnitude_vector, layer.weight.norm(dim=1))
    perturb(model)
    assert (logits(model) - expected).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_dora_with_init_false_is_no_bystander_and_its_magnitude_gets_a_gradient():
    expected = logits(base_model("distilbert"))
    model = adapted(use_dora=True, init_lora_weights=False, task_type=None)
    assert (logits(model) - expected).abs().max() > 1e-3
    model(**batch()).loss.backward()
    assert all(layer.lora_magnitude_vector.grad.any() for layer in layers(model).values())


def test_the_norm_in_dora_is_a_constant_for_the_gradient():
    layer = next(iter(layers(adapted(use_dora=True)).values()))
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 32)
    layer(x).sum().backward()
    g = layer.lora_magnitude_vector.detach() / (layer.weight + layer.delta_weight()).norm(dim=1).detach()
    A = layer.lora_A.weight.detach().requires_grad_()
    (g * (x @ A.T @ layer.lora_B.weight.detach().T) * layer.scaling).sum().backward()
    torch.testing.assert_close(layer.lora_A.weight.grad, A.grad, atol=1e-4, rtol=1e-4)


# On disk


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_no_adapter_name_no_wrapper_and_no_compiler_stands_in_a_key(tmp_path, options):
    config = LoraConfig(r=3, target_modules=Q_V, **options)
    model = get_peft_model(torch.compile(base_model("distilbert")), config)  # which only wraps until it is called
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(base_model("distilbert"), tmp_path)
    keys = list(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.classifier.weight" in keys
    assert "base_model.model.distilbert.transformer.layer.0.attention.q_lin.lora_A.weight" in keys
    assert not [key for key in keys if "default" in key or "_module" in key or "_orig_mod" in key]
    assert all(key.endswith("lora_magnitude_vector") for key in keys if "magnitude" in key)


def test_the_folder_holds_an_adapter_and_no_model_with_a_card_that_names_the_base(tmp_path):
    adapted(base_model_name_or_path="distilbert-base-uncased").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: distilbert-base-uncased\nlibrary_name: peft\n")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        adapted().save_pretrained(tmp_path)


def test_merged_before_saving_or_after_loading_the_weights_are_the_same(tmp_path):
    model = adapted()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("distilbert"), tmp_path).merge_and_unload().state_dict()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == base_model("distilbert").state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in merged.items())
    assert all(tensor.is_contiguous() for tensor in merged.values())


def test_the_seed_at_loading_time_does_not_matter(tmp_path):
    model = adapted()
    perturb(model)
    model.save_pretrained(tmp_path)
    for seed in (0, 1):
        base = base_model("distilbert")
        torch.manual_seed(seed)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        tensors, expected = adapter_tensors(loaded.base_model), adapter_tensors(model.base_model)
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())


def test_an_unknown_option_that_is_off_is_read_past_and_one_that_is_on_is_refused_by_name(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for off in (None, False, {}, []):
        path.write_text(json.dumps(config | {"shiny_new_option": off}))
        PeftModel.from_pretrained(base_model("distilbert"), tmp_path)
    path.write_text(json.dumps(config | {"shiny_new_option": 3}))
    with pytest.raises(UserError, match="shiny_new_option is 3"):
        PeftModel.from_pretrained(base_model("distilbert"), tmp_path)


# What would otherwise go wrong in silence


def test_taking_lora_out_or_merging_while_it_is_switched_off_is_refused(tmp_path):
    model = adapted()
    perturb(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for verb in (model.unload, model.merge_adapter, model.merge_and_unload, lambda: model.load_adapter(tmp_path)):
        with model.disable_adapter(), pytest.raises(UserError, match="switched off"):
            verb()
    assert torch.equal(logits(model), expected)


def test_a_bias_that_two_modules_share_is_trained_and_switched_off_once():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    base[1].bias = base[0].bias
    x = torch.randn(3, 8)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], bias="all", task_type=None))
    perturb(model)
    trained = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), trained)


def test_merging_into_a_weight_that_another_module_shares_is_refused():
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    base[2].weight = base[0].weight
    model = get_peft_model(base, LoraConfig(target_modules=["0"], task_type=None))
    with pytest.raises(UserError, match="shares its weight"):
        model.merge_adapter()


def test_what_only_looks_like_a_linear_layer_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for base, name in ((nn.Sequential(Doubled(8, 8)), "0"), (nn.MultiheadAttention(8, 2), "out_proj")):
        with pytest.raises(UserError, match="only plain"):
            get_peft_model(base, LoraConfig(target_modules=[name], task_type=None))
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(UserError, match="hooks"):
        get_peft_model(hooked, LoraConfig(target_modules=["0"], task_type=None))


def test_saving_what_was_unloaded_does_not_overwrite_an_adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.unload()
    with pytest.raises(UserError, match="no LoRA"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    again = get_peft_model(model, LoraConfig(r=3, target_modules=Q_V))  # the wrapper of before is looked through
    assert (
        adapter_tensors(again.base_model).keys() == safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    )


def test_modules_to_save_are_matched_at_the_end_of_a_name_as_peft_matches_them():
    options = {"target_modules": Q_V, "modules_to_save": ["layer_norm"]}
    ours = get_peft_model(base_model("distilbert"), LoraConfig(**options))
    theirs = peft.get_peft_model(base_model("distilbert"), peft.LoraConfig(task_type="SEQ_CLS", **options))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_a_head_can_be_asked_for_what_it_is_and_cast_with_its_model():
    model = adapted()
    perturb(model)
    head = model.classifier
    assert head.weight is head.trained_module.weight
    with model.disable_adapter():
        assert head.weight is head.original_module.weight
    expected = logits(model)
    torch.testing.assert_close(logits(model.to(torch.bfloat16)).float(), expected, atol=0.5, rtol=0.1)


def test_biases_in_16_bits_are_not_trained():
    with pytest.raises(UserError, match="biases in float32"):
        get_peft_model(base_model("distilbert").to(torch.bfloat16), LoraConfig(target_modules=Q_V, bias="all"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": None}, "rank_pattern is None"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"use_dora": "no"}, "use_dora is 'no'"),
        ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'"),
        ({"inference_mode": True}, "inference_mode is True"),
        ({"lora_alpha": 1e300}, "lora_alpha is"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**options)


def test_what_a_script_for_peft_types_is_taken():
    config = LoraConfig(task_type=TaskType.SEQ_CLS, inference_mode=False, r=2, target_modules={"v_lin", "q_lin"})
    assert config == LoraConfig(r=2, target_modules=["q_lin", "v_lin"])
    model = get_peft_model(base_model("distilbert"), config)
    assert model.get_base_model() is model.base_model
