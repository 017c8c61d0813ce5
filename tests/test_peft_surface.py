"""peft's names beside the numbers: signatures, verbs, configuration, and what scripts written for peft do with them.

Each claim runs the same lines with both libraries, or says what is refused here and why.
"""

import dataclasses
import inspect
import re
import warnings

import peft
import pytest
import torch
import transformers
from helpers import Q_V, adapted, base_model, batch, layers, logits, perturb, trainable
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

import lora
from lora import LoraConfig, PeftModel, TaskType, get_peft_model
from lora.adapter import adapter_tensors
from lora.errors import UserError
from lora.targets import check_target_module_exists, find_minimal_target_modules, find_targets

LIBRARIES = pytest.mark.parametrize("library", [peft, lora], ids=["peft", "lora"])


def roberta() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_labels": 4}
    config = transformers.RobertaConfig(vocab_size=99, max_position_embeddings=40, **shape)
    return transformers.RobertaForSequenceClassification(config).eval()


def language_model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, max_position_embeddings=40, **shape)).eval()


def targets(model: nn.Module) -> list[str]:
    """The names of the adapted layers."""
    return [name.removesuffix(".lora_A").removeprefix("base_model.model.") for name, _ in model.named_modules()
            if name.endswith(".lora_A")]  # fmt: skip


def targets_in(model: nn.Module) -> list[str]:
    """The same, with the prefix that the library gives its model."""
    return [name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")]


# ---- what would surprise


def test_the_wrapped_model_s_own_adapter_verbs_are_out_of_reach():
    """They would act as if there were no LoRA: push_to_hub would upload the whole base model under odd keys."""
    model = adapted()
    for name in [*(name for name in vars(PeftAdapterMixin) if not name.startswith("_")), "push_to_hub"]:
        assert hasattr(model.base_model, name)
        if name in ("load_adapter", "active_adapters"):
            assert name in vars(PeftModel)
        else:
            with pytest.raises(AttributeError, match=f"{name} .* See load_adapter, save_pretrained"):
                getattr(model, name)


def test_load_adapter_keeps_the_tensors_of_an_optimizer(tmp_path):
    first, second = perturb(adapted(lora_alpha=7, lora_dropout=0.1), 1), perturb(adapted(lora_dropout=0.3), 2)
    expected = logits(second)
    second.save_pretrained(tmp_path)
    tensors = trainable(first)
    optimizer = torch.optim.SGD(tensors.values(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.load_adapter(tmp_path, is_trainable=True)
    assert torch.equal(logits(first), expected)
    assert {layer.lora_dropout.p for layer in layers(first).values()} == {0.3}
    assert all(trainable(first)[name] is tensor for name, tensor in tensors.items())
    first(**batch()).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(first), expected)


def test_load_adapter_says_that_the_optimizer_must_be_made_anew(tmp_path):
    adapted(r=5).save_pretrained(tmp_path)
    model = adapted(r=3)
    with pytest.warns(UserWarning, match="make the optimizer anew"):
        model.load_adapter(tmp_path, is_trainable=True)


def test_a_layer_whose_weight_is_read_past_it_is_refused():
    """In evaluation nn.TransformerEncoderLayer hands its weights to one fused function."""
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    for wanted in (["linear1"], "all-linear", r"0\.linear2"):
        with pytest.raises(UserError, match=r"0\.linear[12] cannot be adapted: in evaluation nn.TransformerEncoderLayer"):
            get_peft_model(network, LoraConfig(target_modules=wanted, task_type=None))
    config = LoraConfig(target_modules="all-linear", exclude_modules=["linear1", "linear2"], task_type=None)
    assert targets(get_peft_model(network, config).base_model) == ["1"]


@pytest.mark.parametrize("container", [nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleDict({"a": nn.Linear(4, 4)})])
def test_a_container_is_not_a_module_to_save(container):
    network = nn.ModuleDict({"lin": nn.Linear(4, 4), "more": container})
    with pytest.raises(UserError, match=r"modules_to_save: more is a Module(List|Dict), which computes nothing"):
        get_peft_model(network, LoraConfig(target_modules=["lin"], modules_to_save=["more"], task_type=None))


def test_targets_within_the_head_are_left_out_as_in_peft(tmp_path):
    """RoBERTa's classifier has a layer `dense`, like its encoder."""
    options = {"r": 3, "task_type": "SEQ_CLS", "target_modules": ["query", "dense"]}
    theirs = perturb(peft.get_peft_model(roberta(), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(roberta(), tmp_path)
    assert targets(ours.base_model) == targets(theirs)
    assert not any("classifier" in name for name in targets(ours.base_model))
    assert torch.equal(logits(ours), logits(theirs))


def test_all_linear_leaves_out_the_output_of_a_language_model():
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    ours, theirs = lora.get_peft_model(language_model(), lora.LoraConfig(**options)), peft.get_peft_model(
        language_model(), peft.LoraConfig(**options))  # fmt: skip
    assert targets(ours.base_model) == targets(theirs)
    assert "lm_head" not in targets(ours.base_model)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["q_lin", "v_lin", "nothing"]},
        {"modules_to_save": ["classifier", "nothing"]},
        {"rank_pattern": {"nothing": 5}, "alpha_pattern": {"nothing": 5}},
        {"task_type": None, "modules_to_save": None},  # the head is in the file all the same
    ],
)
def test_a_file_is_read_as_peft_reads_it(change, tmp_path):
    """Names that match nothing, although they are refused where an adapter is made."""
    model = perturb(adapted())
    model.save_pretrained(tmp_path)
    config = dataclasses.replace(model.active_peft_config, **change)
    config.save_pretrained(tmp_path)
    ours, theirs = (library.PeftModel.from_pretrained(base_model(), tmp_path) for library in (lora, peft))
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(logits(ours), logits(model))
    if "task_type" not in change:
        with pytest.raises(UserError, match="nothing"):
            adapted(**change)


# ---- patterns and lists of any size


@pytest.mark.parametrize("hostile", [r"([a-z0-9_.]+)+!", "(a|a){9}!", ".*" * 30 + "!"])
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_could_backtrack_for_ever_is_refused(option, hostile):
    with pytest.raises(UserError, match=f"{option}: .* takes too long to match"):
        adapted(**{option: {hostile: 2} if option.endswith("pattern") else hostile})


@pytest.mark.parametrize(
    "wanted",
    [r"(?:.*?(?:layer|h).*?(?:attention).*?(?:q_lin|k_lin).*?)", r"^(?!.*(\w+2)$).*\.ffn\.lin.*", r".*layer\.[0-5]\..*_lin$"],
)
def test_other_expressions_match_as_in_re(wanted):
    names = [name for name, module in base_model().named_modules() if type(module) is nn.Linear]
    found = find_targets(base_model(), LoraConfig(target_modules=wanted), [])
    assert found == [name for name in names if re.fullmatch(wanted, name)]
    assert found


def test_lists_and_dictionaries_are_bounded():
    with pytest.raises(UserError, match=r"rank_pattern has 100,000 entries. Supported: 10,000"):
        LoraConfig(rank_pattern={f"layer{i}": 2 for i in range(100_000)})
    with pytest.raises(UserError, match=r"target_modules has 1,000,000 entries"):
        LoraConfig(target_modules=["q_lin"] * 1_000_000)


# ---- the surface


@pytest.mark.parametrize(
    "name",
    ["get_peft_model", "inject_adapter_in_model", "get_peft_model_state_dict", "set_peft_model_state_dict", "PeftModel",
     "PeftModel.from_pretrained", "PeftModel.load_adapter", "PeftModel.save_pretrained"],
)  # fmt: skip
def test_the_first_parameters_are_peft_s(name):
    ours, theirs = (
        list(inspect.signature(eval(f"library.{name}", {"library": library})).parameters) for library in (lora, peft)
    )
    mine = [parameter for parameter in ours if parameter in theirs]
    assert mine == [parameter for parameter in theirs if parameter in mine]
    assert ours[:2] == theirs[:2] or name.endswith("state_dict")


def test_harmless_options_are_accepted_and_others_refused(tmp_path):
    config = LoraConfig(target_modules=Q_V)
    model = get_peft_model(base_model(), config, adapter_name="default", mixed=False, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path, safe_serialization=True, is_main_process=True, state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "nowhere", is_main_process=False)
    assert not (tmp_path / "nowhere").exists()
    model.load_adapter(tmp_path, "default", is_trainable=False, torch_device="cpu")
    PeftModel.from_pretrained(base_model(), tmp_path, "default", False, None, torch_device="cpu", low_cpu_mem_usage=True)
    model.merge_and_unload(progressbar=False, safe_merge=True)
    for call in (
        lambda: get_peft_model(base_model(), config, "other"),
        lambda: get_peft_model(base_model(), config, mixed=True),
        lambda: get_peft_model(base_model(), config, strange=1),
        lambda: model.save_pretrained(tmp_path, safe_serialization=False),
        lambda: model.load_adapter(tmp_path, "other"),
        lambda: model.load_adapter(tmp_path, ignore_mismatched_sizes=True),
    ):
        with pytest.raises(UserError, match=r"^\w+=.* is not supported"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["layer.1.attention.q_lin", "v_lin"]},
        {"exclude_modules": r".*\.layer\.0\..*"},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
        {"layers_to_transform": 0, "layers_pattern": ["h", "layer"]},
    ],
)
def test_layers_are_chosen_as_in_peft(options, tmp_path):
    options = {"target_modules": Q_V, "task_type": "SEQ_CLS"} | options
    ours, theirs = (library.get_peft_model(base_model(), library.LoraConfig(**options)) for library in (lora, peft))
    assert targets(ours.base_model) == targets(theirs)
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base_model(), tmp_path)), logits(ours))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "electra", "deberta-v2"])
def test_the_usual_targets_are_peft_s(kind):
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    from lora.targets import USUAL_TARGETS

    assert USUAL_TARGETS[kind] == THEIRS[kind]


def test_targets_may_be_left_out():
    model = get_peft_model(base_model(), LoraConfig())
    assert model.active_peft_config.target_modules == Q_V
    assert len(layers(model)) == 4


def test_the_configuration_as_a_dictionary(tmp_path):
    model = adapted(task_type=None)
    assert model.peft_config == {"default": model.active_peft_config}
    assert LoraConfig(**model.active_peft_config.to_dict()) == model.active_peft_config
    model.save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert theirs.auto_mapping == {"base_model_class": "DistilBertForSequenceClassification",
        "parent_library": "transformers.models.distilbert.modeling_distilbert"}  # fmt: skip
    assert lora.PeftConfig.from_pretrained(tmp_path).inference_mode
    assert adapted().active_peft_config.auto_mapping is None


@pytest.mark.parametrize("task", [None, *TaskType])
def test_the_head_follows_from_the_task(task):
    network = {"lin": nn.Linear(4, 4), "classifier": nn.Linear(4, 4), "qa_outputs": nn.Linear(4, 2), "score": nn.Linear(4, 2)}
    models = [library.get_peft_model(nn.ModuleDict(network), library.LoraConfig(target_modules=["lin"], task_type=task))
              for library in (lora,)]  # fmt: skip
    heads = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
    assert (models[0].active_peft_config.modules_to_save or []) == heads.get(task, [])


@LIBRARIES
def test_the_adapter_is_switched_off_and_on(library):
    model = library.get_peft_model(base_model(), library.LoraConfig(r=3, target_modules=Q_V, task_type="SEQ_CLS", bias="none"))
    assert (model.active_adapter, list(model.active_adapters)) == ("default", ["default"])
    assert model.active_peft_config.r == 3
    before = logits(perturb(model))
    model.disable_adapter_layers()
    disabled = logits(model)
    assert not torch.equal(disabled, before)
    if library is lora:  # peft's head stays the trained one
        assert torch.equal(disabled, logits(base_model()))
        with pytest.raises(UserError, match=r"enable_adapter_layers"):
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), disabled)
        assert torch.equal(logits(model), disabled)
    model.enable_adapter_layers()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_switched_off_while_merged(bias):
    model = perturb(adapted(bias=bias))
    before = logits(model)
    model.merge_adapter()
    model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(base_model()))
    model.enable_adapter_layers()
    assert torch.equal(logits(model), before)


def test_an_adapter_that_breaks_while_it_is_disabled_leaves_an_enabled_model():
    model = perturb(adapted(bias="all"))
    before = logits(model)
    model.merge_adapter()
    layer = next(iter(layers(model).values()))
    good = layer.lora_A.weight.data.clone()
    with pytest.raises(UserError, match="not finite"), model.disable_adapter():
        layer.lora_A.weight.data[:] = float("nan")
    layer.lora_A.weight.data.copy_(good)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_state_dicts_have_peft_s_keys_and_go_back():
    options = {"r": 3, "target_modules": Q_V, "task_type": "SEQ_CLS"}
    ours, theirs = (library.get_peft_model(base_model(), library.LoraConfig(**options)) for library in (lora, peft))
    perturb(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == lora.get_peft_model_state_dict(ours).keys()
    assert lora.set_peft_model_state_dict(ours, state).unexpected_keys == []
    assert torch.equal(logits(ours), logits(theirs))
    with pytest.raises(UserError, match="the state dict lacks "):
        lora.set_peft_model_state_dict(ours, {})


def test_a_state_dict_takes_effect_in_a_merged_model():
    model, other = adapted(), perturb(adapted())
    model.merge_adapter()
    lora.set_peft_model_state_dict(model, lora.get_peft_model_state_dict(other))
    assert torch.equal(logits(model), logits(other))


def test_lora_is_put_into_a_model_without_a_wrapper():
    options = {"r": 3, "target_modules": Q_V, "task_type": None}
    ours, theirs = (library.inject_adapter_in_model(library.LoraConfig(**options), base_model()) for library in (lora, peft))
    assert type(ours) is type(theirs)
    assert lora.get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()


@pytest.mark.parametrize("patterns", [None, "layers", ["h", "layers"], ["spam", "bar"], ["bar", "spam"]])
@pytest.mark.parametrize(
    "key", ["a.layers.1.experts.0.up", "bar.2.spam.1.up", "x.bar.001.spam.2.up", "up", "h.1.other", "1.up"]
)
def test_one_name_is_a_target_as_in_peft(key, patterns):
    from peft.tuners.tuners_utils import check_target_module_exists as theirs

    for options in ({}, {"exclude_modules": ["1.up"]}, {"exclude_modules": r".*spam.*"}):
        options |= {"target_modules": ["up", "h.1.other"], "layers_to_transform": [1, 7], "layers_pattern": patterns}
        assert check_target_module_exists(LoraConfig(**options), key) == bool(theirs(peft.LoraConfig(**options), key))


@pytest.mark.parametrize(
    ("targets", "others"),
    [
        (["1.foo", "2.foo", "bar.baz"], ["3.foo", "bar.bla"]),
        (["a.proj", "b.time_proj"], ["a", "b", "a.other"]),
        (["x.0.query", "x.1.query"], ["x", "x.0", "y_x.0.query", "y_x.1.query"]),
    ],
)
def test_the_shortest_ends_of_names_are_peft_s(targets, others):
    from peft.tuners.tuners_utils import _find_minimal_target_modules as theirs

    assert find_minimal_target_modules(targets, others) == theirs(targets, others)
    for wrong, why in (("foo", "should be a list"), ([], "should be a list"), (["", "a"], "empty string")):
        with pytest.raises(UserError, match=why):
            find_minimal_target_modules(wrong, others)


@pytest.mark.parametrize("where", ["a.1.lin", "a.lin"])
def test_a_module_to_save_is_written_so_that_it_names_no_other(where, tmp_path):
    """peft looks for the ends of names, and "1.lin" is also an end of "a.11.lin"."""
    layer = {"a": nn.ModuleDict({"1": nn.ModuleDict({"lin": nn.Linear(3, 3)}), "11": nn.ModuleDict({"lin": nn.Linear(3, 3)}),
                                 "lin": nn.Linear(3, 3)}), "up": nn.Linear(3, 3)}  # fmt: skip
    model = get_peft_model(nn.ModuleDict(layer), LoraConfig(target_modules=["up"], modules_to_save=[where], task_type=None))
    assert model.active_peft_config.modules_to_save == [where]


@LIBRARIES
def test_the_state_of_the_layers_can_be_asked(library):
    model = library.get_peft_model(base_model(), library.LoraConfig(target_modules=Q_V, task_type="SEQ_CLS"))
    assert model.targeted_module_names == [name.removeprefix("base_model.") for name in targets(model)]
    adapted_layers = [model.get_submodule(name) for name in targets_in(model)]
    for disabled in (True, False):
        (model.disable_adapter_layers if disabled else model.enable_adapter_layers)()
        assert {layer.disable_adapters for layer in adapted_layers} == {disabled}
        with model.disable_adapter():
            assert {layer.disable_adapters for layer in adapted_layers} == {True}
            assert not model.has_active_enabled_adapter
        assert {layer.disable_adapters for layer in adapted_layers} == {disabled}


@LIBRARIES
def test_a_module_to_exclude_that_excludes_nothing_is_told(library):
    config = library.LoraConfig(target_modules=["q_lin"], exclude_modules=["nothing"], task_type=None)
    with pytest.warns(UserWarning, match=r"exclude_modules=.*nothing.* no modules were excluded"):
        library.get_peft_model(base_model(), config)


@LIBRARIES
def test_the_revision_of_the_base_model_is_kept(library):
    config = library.LoraConfig(target_modules=Q_V, task_type="SEQ_CLS")
    assert library.get_peft_model(base_model(), config, revision="abc").peft_config["default"].revision == "abc"


@pytest.mark.parametrize("option", ["token", "cache_dir", "local_files_only"])
def test_an_option_of_the_hub_is_refused_where_no_hub_is_asked(option, tmp_path):
    for call in (lambda: get_peft_model(base_model(), LoraConfig(), **{option: "x"}),
                 lambda: adapted().save_pretrained(tmp_path, **{option: "x"})):  # fmt: skip
        with pytest.raises(UserError, match=f"{option}='x' is not supported"):
            call()


@LIBRARIES
def test_a_configuration_by_itself_is_written_as_it_is(library, tmp_path):
    config = library.LoraConfig(r=3, target_modules=Q_V)
    config.save_pretrained(tmp_path)
    assert library.LoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert library.LoraConfig.from_json_file(str(tmp_path / "adapter_config.json"))["r"] == 3


def test_inference_mode_freezes_the_adapter():
    assert not trainable(adapted(inference_mode=True))


def test_the_forward_has_the_base_model_s_signature():
    model = adapted()
    assert inspect.signature(model.forward) == inspect.signature(model.base_model.forward)
    assert "labels" in inspect.signature(type(model).forward).parameters
    assert adapter_tensors(model.base_model).keys()
