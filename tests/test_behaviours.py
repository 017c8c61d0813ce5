"""What peft's own tests check, checked here: how adapters start, scale, find their layers, train, load and unload."""

import json
import math

import peft
import pytest
import safetensors.torch
import torch
from helpers import Q_V, adapted, base_model, batch, layers, logits, perturb, trainable
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lora import LoraConfig, LoRALinear, PeftModel, TaskType, get_peft_model
from lora.adapter import adapter_tensors
from lora.errors import UserError
from lora.targets import find_targets, pattern_values
from lora.variants import DoRALinear
from training.optimizer import parameter_groups


def wide(**options) -> LoRALinear:
    """LoRA beside one layer, wide enough to show the distribution of its random numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 1000))
    config = {"r": 100, "target_modules": ["0"], "task_type": None} | options
    return get_peft_model(model, LoraConfig(**config)).base_model[0]


# How an adapter starts


def test_A_starts_uniform_and_B_at_zero():
    """A between -1 / sqrt(d_in) and 1 / sqrt(d_in)."""
    layer = wide()
    A, bound = layer.lora_A.weight.detach(), 1 / math.sqrt(1000)
    assert A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of a uniform distribution
    assert (A.abs() > 0.9 * bound).float().mean() == pytest.approx(0.1, abs=0.01)  # a normal one has fewer near its ends
    assert not layer.lora_B.weight.any()


def test_gaussian_A_starts_normal_and_B_at_zero():
    """With deviation 1 / r."""
    layer = wide(init_lora_weights="gaussian")
    A = layer.lora_A.weight.detach()
    assert A.std() == pytest.approx(0.01, rel=0.02)
    assert (A.abs() > 0.02).float().mean() == pytest.approx(0.0455, abs=0.005)
    assert not layer.lora_B.weight.any()


def test_init_false_starts_with_a_nonzero_B():
    layer = wide(init_lora_weights=False)
    assert layer.lora_B.weight.detach().std() == pytest.approx(1 / math.sqrt(300), rel=0.02)
    assert layer.delta_weight().abs().max() > 1e-3


# How an adapter is scaled


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert wide(r=4, lora_alpha=10).scaling == 2.5
    assert wide(r=4, lora_alpha=10, use_rslora=True).scaling == 5.0
    layer = wide(r=4, lora_alpha=10)
    nn.init.ones_(layer.lora_B.weight)
    x = torch.randn(3, 1000)
    expected = x @ layer.weight.T + layer.bias + 2.5 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer.eval()(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_set_rank_and_scale_as_in_peft(use_rslora):
    patterns = {"rank_pattern": {"q_lin": 8, "layer.1.attention.v_lin": 4}, "alpha_pattern": {"v_lin": 9}}
    options = {"r": 3, "lora_alpha": 6, "target_modules": Q_V, "use_rslora": use_rslora, **patterns}
    ours = get_peft_model(base_model(), LoraConfig(**options))
    theirs = peft.get_peft_model(base_model(), peft.LoraConfig(task_type="SEQ_CLS", **options))
    for name, layer in layers(ours.base_model).items():
        reference = theirs.base_model.model.get_submodule(name)
        assert (layer.lora_A.out_features, layer.scaling) == (reference.r["default"], reference.scaling["default"]), name
    assert len({layer.scaling for layer in layers(ours).values()}) == 3


def test_a_redundant_rank_pattern_changes_no_scale():
    plain, redundant = (adapted(alpha_pattern={"q_lin": 5}, rank_pattern=pattern) for pattern in ({}, {"q_lin": 3}))
    assert [a.scaling for a in layers(plain).values()] == [b.scaling for b in layers(redundant).values()]


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        ({"q_lin": 1}, "layer.0.q_lin", 1),
        ({"q_lin": 1}, "layer.0.xq_lin", 0),  # the match starts at a dot
        ({"0.q_lin": 1, "q_lin": 2}, "layer.0.q_lin", 1),  # the first match wins
        ({"q_lin": 2, "0.q_lin": 1}, "layer.0.q_lin", 2),
        ({"^q_lin": 1}, "layer.0.q_lin", 0),  # anchored, it does not match after a dot,
        ({"^layer.0.q_lin": 1}, "layer.0.q_lin", 1),  # but it matches the full name
        (dict.fromkeys(["nothing", "at_all"], 1), "layer.0.q_lin", 0),
        ({r"layer\.[02].*": 1}, "model.layer.2.q_lin", 1),
        ({"layer.0": 1}, "layer.0.q_lin", 0),  # the match ends with the name
    ],
)
def test_patterns_match_names_as_in_peft(patterns, name, expected):
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(patterns.keys(), name)
    found = pattern_values("rank_pattern", patterns, [name], 0, strict=False)[name]
    assert found == patterns.get(key, 0) == expected


def test_scaled_by_zero_it_is_the_base_model():
    model = perturb(adapted(task_type=None))
    expected = logits(base_model())
    assert not torch.allclose(logits(model), expected, atol=0.01)
    for layer in layers(model).values():
        layer.scaling = 0.0
    assert torch.equal(logits(model), expected)


# Which layers are adapted


def stack() -> nn.Module:
    """Names as real models have them: numbered layers with numbered experts, and a name that ends another ("q", "xq")."""

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
def test_targets_are_found_as_in_peft(wanted, layers_to_transform):
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


def test_layers_to_transform_limits_an_expression_too():
    both = "model.layers.0.q|model.layers.1.q"
    config = LoraConfig(target_modules=both, layers_to_transform=[0], task_type=None)
    assert find_targets(stack(), config, []) == ["model.layers.0.q"]


def test_an_expert_s_number_is_not_the_layer_s():
    config = LoraConfig(target_modules=["up"], layers_to_transform=[1], task_type=None)
    assert find_targets(stack(), config, []) == [f"model.layers.1.experts.{expert}.up" for expert in range(3)]


def test_layers_to_transform_survives_saving(tmp_path):
    model = perturb(adapted(layers_to_transform=[0], task_type=None))
    assert len(adapter_tensors(model.base_model)) == 4
    assert len(adapter_tensors(adapted(task_type=None).base_model)) == 8
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
def test_all_linear_never_adapts_the_head(kind):
    model = adapted(base_model(kind), target_modules="all-linear")
    linear = [name for name, module in base_model(kind).named_modules() if isinstance(module, nn.Linear)]
    assert list(layers(model.base_model)) == [name for name in linear if not name.endswith("classifier")]
    assert len(layers(model)) > 10


# What is trained


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_training_moves_exactly_what_is_trainable(options):
    model = adapted(**options).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_a_loaded_adapter_is_frozen_by_default(tmp_path):
    model = adapted(lora_dropout=0.5)
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(base_model(), tmp_path)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not any(module.training for module in frozen.modules())
    again = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert trainable(again).keys() == trainable(model).keys()
    with pytest.raises(UserError, match="is_trainable=True"):
        parameter_groups(frozen, 1e-3, 1.0)


def test_loraplus_raises_only_the_rate_of_B():
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


def test_dora_starts_as_the_base_and_can_be_disabled():
    expected = logits(base_model())
    model = adapted(use_dora=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    for layer in layers(model).values():
        assert isinstance(layer, DoRALinear)
        assert torch.equal(layer.lora_magnitude_vector, layer.weight.norm(dim=1))
    perturb(model)
    assert (logits(model) - expected).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_dora_with_init_false_trains_its_magnitude():
    expected = logits(base_model())
    model = adapted(use_dora=True, init_lora_weights=False, task_type=None)
    assert (logits(model) - expected).abs().max() > 1e-3
    model(**batch()).loss.backward()
    assert all(layer.lora_magnitude_vector.grad.any() for layer in layers(model).values())


def test_the_norm_in_dora_is_constant_to_the_gradient():
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
def test_keys_name_no_adapter_wrapper_or_compiler(tmp_path, options):
    model = adapted(torch.compile(base_model()), **options)  # it only wraps the model, until the first call
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(base_model(), tmp_path)
    keys = list(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.classifier.weight" in keys
    assert "base_model.model.distilbert.transformer.layer.0.attention.q_lin.lora_A.weight" in keys
    assert not [key for key in keys if "default" in key or "_module" in key or "_orig_mod" in key]
    assert all(key.endswith("lora_magnitude_vector") for key in keys if "magnitude" in key)


def test_an_adapter_is_not_saved_beside_a_whole_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        adapted().save_pretrained(tmp_path)


def test_merging_before_saving_or_after_loading_is_equal(tmp_path):
    model = perturb(adapted())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).merge_and_unload().state_dict()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == base_model().state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in merged.items())
    assert all(tensor.is_contiguous() for tensor in merged.values())


def test_the_seed_at_loading_does_not_matter(tmp_path):
    model = perturb(adapted())
    model.save_pretrained(tmp_path)
    for seed in (0, 1):
        base = base_model()
        torch.manual_seed(seed)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        tensors, expected = adapter_tensors(loaded.base_model), adapter_tensors(model.base_model)
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())


def test_an_unknown_option_is_refused_only_if_it_is_on(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for off in (None, False, {}, []):
        path.write_text(json.dumps(config | {"shiny_new_option": off}))
        PeftModel.from_pretrained(base_model(), tmp_path)
    path.write_text(json.dumps(config | {"shiny_new_option": 3}))
    with pytest.raises(UserError, match="shiny_new_option is 3"):
        PeftModel.from_pretrained(base_model(), tmp_path)


# What would otherwise go wrong silently


def test_a_disabled_adapter_is_not_merged_or_unloaded(tmp_path):
    model = perturb(adapted())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for verb in (model.unload, model.merge_adapter, model.merge_and_unload, lambda: model.load_adapter(tmp_path)):
        with model.disable_adapter(), pytest.raises(UserError, match="disabled here"):
            verb()
    assert torch.equal(logits(model), expected)


def test_a_shared_bias_is_trained_and_disabled_once():
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


def test_merging_into_a_shared_weight_is_refused():
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    base[2].weight = base[0].weight
    model = get_peft_model(base, LoraConfig(target_modules=["0"], task_type=None))
    with pytest.raises(UserError, match="shares its weight"):
        model.merge_adapter()


def test_only_plain_linear_layers_are_adapted():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for base, name in ((nn.Sequential(Doubled(8, 8)), "0"), (nn.MultiheadAttention(8, 2), "out_proj")):
        with pytest.raises(UserError, match="Only plain"):
            get_peft_model(base, LoraConfig(target_modules=[name], task_type=None))
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked[0].register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(UserError, match="hooks"):
        get_peft_model(hooked, LoraConfig(target_modules=["0"], task_type=None))


def test_an_unloaded_adapter_does_not_overwrite_a_file(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.unload()
    with pytest.raises(UserError, match="no LoRA"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    again = adapted(model)  # the empty wrapper is removed
    assert (
        adapter_tensors(again.base_model).keys() == safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    )


def test_the_head_can_be_read_and_cast():
    model = perturb(adapted())
    head = model.classifier
    assert head.weight is head.trained_module.weight
    with model.disable_adapter():
        assert head.weight is head.original_module.weight
    expected = logits(model)
    torch.testing.assert_close(logits(model.to(torch.bfloat16)).float(), expected, atol=0.5, rtol=0.1)


def test_biases_in_16_bits_are_not_trained():
    with pytest.raises(UserError, match="float32 biases"):
        adapted(base_model().to(torch.bfloat16), bias="all")


def test_the_arguments_of_a_peft_script_are_accepted():
    config = LoraConfig(task_type=TaskType.SEQ_CLS, inference_mode=False, r=2, target_modules={"v_lin", "q_lin"})
    assert config == LoraConfig(r=2, target_modules=["q_lin", "v_lin"])
    model = get_peft_model(base_model(), config)
    assert model.get_base_model() is model.base_model
