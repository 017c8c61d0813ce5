"""PeftModel and get_peft_model: the methods that peft's users know, each a line or two over inject.py and adapter.py."""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora import adapter, inject
from lora.config import LoraConfig
from lora.errors import UserError
from lora.files import find_folder
from lora.layer import LoRALinear
from lora.modules_to_save import ModulesToSaveWrapper
from lora.targets import find_head, find_minimal_target_modules

# peft's options: those of which one value is supported, those that change nothing here, and those of the hub
ONLY = {"adapter_name": "default", "mixed": False, "safe_serialization": True}
NO_EFFECT = {"autocast_adapter_dtype", "torch_device", "low_cpu_mem_usage", "save_function", "state_dict"}
HUB = {"revision", "token", "cache_dir", "local_files_only"}


def print_trainable_parameters(model: nn.Module) -> None:
    """Print both counts and the percentage that is trainable, in peft's words."""
    trainable, total = inject.count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


class _Forward:
    """`forward` with the base model's signature, from which transformers.Trainer learns the columns of a batch."""

    def __get__(self, model: Any, owner: Any = None) -> Callable[..., Any]:
        if model is None:  # the class's signature tells it that there are labels
            return lambda *args, labels=None, **kwargs: None
        return functools.wraps(model.base_model.forward)(lambda *args, **kwargs: model.base_model(*args, **kwargs))


class PeftModel(nn.Module):
    """A model with LoRA in it. Attributes that are not defined here are those of the wrapped model, `base_model`."""

    base_model: nn.Module
    active_adapter, active_adapters = "default", ["default"]
    prefix = "lora_"  # of the names of what an adapted layer trains
    forward = _Forward()

    def __init__(self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **options: Any):
        super().__init__()
        strict = options.pop("strict", True)  # a name in a file may match nothing, as in peft
        peft_config = replace(peft_config, revision=options.pop("revision", None) or peft_config.revision)
        _check_options(options, adapter_name=adapter_name)
        self.base_model = _unwrapped(model)  # the wrapper may have been left after unload()
        inject.inject(self.base_model, peft_config, strict)
        self._describe(peft_config)

    def _describe(self, config: LoraConfig) -> None:
        model = self.base_model
        kinds = {name.replace("_orig_mod.", ""): type(module) for name, module in model.named_modules()}  # of torch.compile
        config = replace(config, modules_to_save=sorted(name for name, kind in kinds.items() if kind is ModulesToSaveWrapper))
        if config.target_modules in (None, "all-linear"):
            targets = {name for name, kind in kinds.items() if issubclass(kind, LoRALinear)}
            config.target_modules = sorted(find_minimal_target_modules(targets, kinds.keys() - targets))
        config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
        where = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        config.auto_mapping = None if config.task_type else where
        self.peft_config = {"default": config}
        if config.inference_mode:
            self.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet
                raise
            value = getattr(self.base_model, name)
            if getattr(value, "__module__", "") in ("transformers.integrations.peft", "transformers.utils.hub"):
                raise AttributeError(f"{name} would not know of this adapter. See load_adapter, save_pretrained") from None
            return value

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config["default"]

    @property
    def targeted_module_names(self) -> list[str]:
        return [name for name, module in self.base_model.named_modules() if isinstance(module, LoRALinear)]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return not any(module.disable_adapters for module in inject.adapted_modules(self))

    def get_base_model(self) -> nn.Module:
        return self.base_model

    get_nb_trainable_parameters = inject.count_parameters
    print_trainable_parameters = print_trainable_parameters
    disable_adapter = inject.disable_adapter
    unmerge_adapter = inject.unmerge
    disable_adapter_layers = functools.partialmethod(inject.enable, enabled=False)  # a merged adapter is unmerged for good
    enable_adapter_layers = functools.partialmethod(inject.enable, enabled=True)

    def merge_adapter(self, adapter_names: None = None, safe_merge: bool = True) -> None:
        """Add every dW to its W0. A merged adapter is not trained. Raises UserError as `inject.merge` does."""
        inject.merge(self)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = True) -> nn.Module:
        """The original model object, frozen, with every dW added and the trained head in place. Raises as `merge_adapter`."""
        return inject.unload(self.base_model, merged=True)

    def unload(self) -> nn.Module:
        """The original model object, frozen, and otherwise as it was before LoRA, head included."""
        return inject.unload(self.base_model, merged=False)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **options: Any) -> None:
        """Write configuration and weights, head included, unless `is_main_process` is False. Raises as `save_adapter` does."""
        is_main_process = options.pop("is_main_process", True)
        _check_options(options, safe_serialization=safe_serialization)
        if is_main_process:
            adapter.save_adapter(self.base_model, self.active_peft_config, save_directory)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        config: LoraConfig | None = None, **options: Any,
    ) -> "PeftModel":  # fmt: skip
        """Load an adapter, written here or by peft, into `model`, in place. It is frozen and in evaluation mode unless
        `is_trainable`. model_id: a folder, or a name on the hub. config: in place of the folder's.

        Raises UserError, with `model` unchanged, if the folder holds no adapter or one that does not fit the model.
        """
        config, tensors, _ = _read_for(model, model_id, is_trainable, config, options | {"adapter_name": adapter_name})
        loaded = cls(model, config, strict=False)
        set_peft_model_state_dict(loaded, tensors)
        return loaded if is_trainable else loaded.eval()

    def load_adapter(self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False, **hub: Any) -> None:
        """Replace this adapter with another. If all shapes are equal its tensors, and so an optimizer of them, stay in use.

        Raises as `from_pretrained` does, with the present adapter unchanged.
        """
        config, tensors, skeleton = _read_for(self, model_id, is_trainable, None, hub | {"adapter_name": adapter_name})
        present = adapter.adapter_tensors(self.base_model)
        if {key: tensor.shape for key, tensor in present.items()} != {key: tensor.shape for key, tensor in tensors.items()}:
            if is_trainable:
                warnings.warn("this adapter has other tensors than the last: make the optimizer anew", stacklevel=2)
            inject.inject(self.unload(), config, strict=False)
        layers, new_layers = (inject.adapted_modules(each, LoRALinear) for each in (self, skeleton))
        for mine, new in zip(layers, new_layers, strict=True):
            mine.scaling, mine.lora_dropout.p = new.scaling, new.lora_dropout.p
        for parameter, new_parameter in zip(self.base_model.parameters(), skeleton.parameters(), strict=True):
            parameter.requires_grad_(new_parameter.requires_grad)
        self._describe(config)
        set_peft_model_state_dict(self, tensors)
        if not is_trainable:
            self.eval()


PeftModelForSequenceClassification = PeftModel  # peft has a class for each task


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.base_model if isinstance(model, PeftModel) else model


def get_peft_model(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **options: Any) -> PeftModel:
    """Put LoRA into `model` and wrap it. This happens in place; only the head is copied.

    Raises UserError, with `model` unchanged, if it contains LoRA already, or if a name in `peft_config` does not fit it.
    """
    return PeftModel(model, peft_config, adapter_name, **options)


def inject_adapter_in_model(peft_config: LoraConfig, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Put LoRA into `model`, in place and without a wrapper."""
    return get_peft_model(model, peft_config, adapter_name).base_model


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The trained tensors under the keys of peft's files. They share the model's memory."""
    _check_options({}, adapter_name=adapter_name)
    prefix = "" if isinstance(model, PeftModel) else adapter.PREFIX
    return {key.removeprefix(prefix): tensor for key, tensor in adapter.adapter_tensors(_unwrapped(model)).items()}


def set_peft_model_state_dict(model: nn.Module, peft_model_state_dict: dict, adapter_name: str = "default") -> Any:
    """Copy tensors into the model, by the keys of `get_peft_model_state_dict`. Raises UserError if they do not fit."""
    present = get_peft_model_state_dict(model, adapter_name)
    tensors = adapter.match_tensors(present, peft_model_state_dict, "the state dict")
    inject.unmerge(model)  # a merged weight holds the old dW
    for key, tensor in tensors.items():
        present[key].copy_(tensor)
    return nn.modules.module._IncompatibleKeys([], [])  # none is missing or unexpected


def _check_options(options: dict[str, Any], known: set[str] = NO_EFFECT, **named: Any) -> None:
    """Raises UserError for an option that is not known, or has a value that is not supported."""
    for name, value in {**named, **options}.items():
        if name not in ONLY.keys() | known or value != ONLY.get(name, value):
            raise UserError(f"{name}={value!r} is not supported. docs/peft.md lists the differences from peft")


def _read_for(model: nn.Module, model_id: str | Path, is_trainable: bool, config: LoraConfig | None, options: dict) -> Any:
    """Read an adapter, and put it into a copy of the model without data to check that it fits: a bad one changes nothing."""
    _check_options(options, NO_EFFECT | HUB)
    folder = find_folder(model_id, {name: options[name] for name in options.keys() & HUB}, adapter.FILES)
    read, tensors = adapter.read_adapter(folder)
    model, config = _unwrapped(model), config or read
    skeleton = copy.deepcopy(model, {id(p): nn.Parameter(p.to("meta"), False) for p in model.parameters()}
                             | {id(buffer): buffer.to("meta") for buffer in model.buffers()})  # fmt: skip
    inject.unload(skeleton, merged=False)
    config = replace(config, inference_mode=not is_trainable)
    if not find_head(skeleton, config, strict=False):  # as in peft the file may hold a head of which it does not speak
        config.modules_to_save = [name for name, _ in skeleton.named_modules() if f"{adapter.PREFIX}{name}.weight" in tensors]
    inject.inject(skeleton, config, strict=False)
    tensors = adapter.match_tensors(adapter.adapter_tensors(skeleton), tensors, folder / adapter.WEIGHTS_FILE)
    return config, tensors, skeleton
