"""An adapter on disk as peft has it: `adapter_config.json` and `adapter_model.safetensors`, both ways.

The keys are those of the model behind peft's prefix: `base_model.model.` + `distilbert.transformer...q_lin.lora_A.weight`.
"""

import os
import re
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from lora.config import CONFIG_FILE, LoraConfig
from lora.errors import UserError
from lora.files import make_folder, read_safetensors, write_file
from lora.inject import ModulesToSaveWrapper
from lora.layer import LoRALinear

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
REDUNDANT = re.compile(r"\.(modules_to_save(\.default)?|original_module)\.(.*\.)?bias$")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that was trained, under peft's keys and sharing the model's memory: adapters, head and biases."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        name = name.replace("_orig_mod.", "")  # torch.compile's wrapper is no part of the model
        if isinstance(module, LoRALinear):
            parameters = {key: value for key, value in module.named_parameters() if key.startswith("lora_")}
        elif isinstance(module, ModulesToSaveWrapper):
            parameters = module.trained_module.state_dict(keep_vars=True)
        else:
            parameters = {}
        if hasattr(module, "original_bias"):
            key = "base_layer.bias" if isinstance(module, LoRALinear) else "bias"  # peft keeps the replaced layer in its own
            parameters[key] = module.bias if module.trained_bias is None else module.trained_bias
        tensors |= {f"{PREFIX}{name}.{key}": value.detach() for key, value in parameters.items()}
    return tensors


def save_adapter(model: nn.Module, config: LoraConfig, folder: str | Path) -> None:
    """Write weights, configuration and, if there is none yet, a model card into `folder`.

    In float32, and byte for byte the same for the same adapter, merged or switched off.

    Raises UserError if a tensor is not finite, and if the folder holds a whole model or cannot be written.
    """
    tensors = {key: tensor.float().cpu().contiguous() for key, tensor in adapter_tensors(model).items()}
    if not tensors:
        raise UserError("there is no LoRA in this model to save: it was unloaded")
    _refuse_what_is_not_finite(tensors, "the adapter")
    folder = make_folder(folder)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} holds a config.json, beside which transformers finds no adapter: name another folder")
    write_file(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(folder)
    if not (folder / "README.md").exists():
        write_file(folder / "README.md", _model_card(config).encode(errors="backslashreplace"))


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter folder. Raises UserError if either cannot be trusted."""
    folder = Path(folder)
    if not os.path.isfile(folder / CONFIG_FILE):  # unlike Path.is_file, it has an answer for a name that is too long
        raise UserError(f"{folder} is no adapter: it holds no {CONFIG_FILE}; name the folder of a run, or of an adapter")
    config = LoraConfig.from_pretrained(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(f"{folder} holds a pickle only (adapter_model.bin), never read: save it again as safetensors")
    tensors = read_safetensors(path)
    _refuse_what_is_not_finite(tensors, str(path))
    return config, tensors


def match_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, one for each that `model` trains. Raises UserError, by name, if they are not those exactly."""
    expected = adapter_tensors(model)
    # peft says the biases of the head three times with bias="all"; under their own names they are there as well
    tensors = {key: tensor for key, tensor in tensors.items() if not REDUNDANT.search(key)}
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise UserError(f"{source} lacks {key}: it is damaged, or its {CONFIG_FILE} is that of another adapter")
        if key not in expected:
            raise UserError(f"{source} holds {key}, for which this model has no place: it was trained on another kind of model")
        theirs, ours = tuple(tensors[key].shape), tuple(expected[key].shape)
        if theirs[:1] != ours[:1] and theirs[1:] == ours[1:] and _counts_classes(model, key):
            raise UserError(
                f"{source} has {theirs[0]} classes and the model {ours[0]}: load the base model for {theirs[0]} classes"
            )
        if theirs != ours:
            raise UserError(f"{source}: {key} is {theirs}, and the model wants {ours}: it was trained on another base model")
    return tensors


def _counts_classes(model: nn.Module, key: str) -> bool:
    """Whether the first dimension of this tensor is the number of classes: it belongs to the last module of the head."""
    heads = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    return bool(heads) and key.startswith(f"{PREFIX}{heads[-1]}.")


def _refuse_what_is_not_finite(tensors: dict[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{where}: {key} holds what is no finite number: train again, with a smaller learning rate")


def _model_card(config: LoraConfig) -> str:
    base = config.base_model_name_or_path
    header = [f"base_model: {base}", "library_name: peft", "tags:", f"- base_model:adapter:{base}", "- lora"]
    header = header if base else ["library_name: peft", "tags:", "- lora"]
    what = f"A LoRA adapter: r = {config.r}, alpha = {config.lora_alpha:g}, on {config.target_modules}."
    return "\n".join(["---", *header, "---", "", what, "Trained with plain-lora; `peft` loads it onto a DistilBERT, too.", ""])
