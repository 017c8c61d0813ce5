"""An adapter on disk, as peft writes and reads it: `adapter_config.json` and `adapter_model.safetensors`.

A tensor's key is its name in the model behind peft's prefix:
`base_model.model.` + `distilbert.transformer.layer.0.attention.q_lin.lora_A.weight`.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from lora.config import CONFIG_FILE, LoraConfig
from lora.errors import UserError
from lora.files import make_folder, read_safetensors, write_file
from lora.layer import LoRALinear
from lora.modules_to_save import ModulesToSaveWrapper

WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
PREFIX = "base_model.model."
# with bias="all" peft's file holds each bias of the head three times; the one under its own name is read
REPEATED_BIAS = re.compile(r"\.(modules_to_save(\.default)?|original_module)\.(.*\.)?bias$")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors, and the head's buffers, by their keys in peft's files: detached, in the model's memory."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors |= {f"{name}.{key}": value for key, value in module.named_parameters() if key.startswith("lora_")}
        elif isinstance(module, ModulesToSaveWrapper):
            tensors |= {f"{name}.{key}": value for key, value in module.trained_module.state_dict().items()}
        if "other_bias" in module._buffers:  # peft nests an adapted layer as `base_layer`
            key = "base_layer.bias" if isinstance(module, LoRALinear) else "bias"
            tensors[f"{name}.{key}"] = module.bias if module.bias_is_trained else module.other_bias
    # torch.compile wraps a model and adds "_orig_mod." to its names
    return {PREFIX + key.replace("_orig_mod.", ""): value.detach() for key, value in tensors.items()}


def save_adapter(model: nn.Module, config: LoraConfig, folder: str | Path) -> None:
    """Write the adapter's weights, in float32, and its configuration into `folder`.

    The bytes depend only on the adapter's values; a merged or disabled adapter gives the same file. Raises UserError if a
    tensor is not finite, if `folder` holds a whole model, or if it cannot be written.
    """
    tensors = {key: tensor.float().cpu().contiguous() for key, tensor in adapter_tensors(model).items()}
    if not tensors:
        raise UserError("this model contains no LoRA to save: it was unloaded")
    _check_finite(tensors, "the adapter")
    folder = make_folder(folder)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} contains config.json, and beside it transformers ignores an adapter. Pass another folder")
    try:
        write_file(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    except ImportError as error:
        raise UserError("safetensors needs numpy to write a file: pip install numpy") from error
    replace(config, inference_mode=True).save_pretrained(folder)


def read_adapter(folder: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """What an adapter folder holds. Raises UserError if a file is missing or damaged, or if a tensor is not finite."""
    folder = Path(folder)
    if not os.path.lexists(folder / CONFIG_FILE):  # Path.exists raises OSError for a name that is too long
        raise UserError(f"{folder} is not an adapter: {CONFIG_FILE} not found. Pass a run folder or an adapter folder")
    config = LoraConfig.from_pretrained(folder)
    tensors = read_safetensors(folder / WEIGHTS_FILE)
    _check_finite(tensors, folder / WEIGHTS_FILE)
    return config, tensors


def match_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The tensors that were read from `source`, one for each that the model trains: those are `expected`.

    Raises UserError, by name, if one is missing, is unknown to the model, or has another shape there.
    """
    tensors = {key: tensor for key, tensor in tensors.items() if not REPEATED_BIAS.search(key)}
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise UserError(f"{source} lacks {key}. It is damaged, or its {CONFIG_FILE} belongs to another adapter")
        if key not in expected:
            raise UserError(f"{source} contains {key}, which this model does not have. Load the base model of the adapter")
        if (theirs := tuple(tensors[key].shape)) != (ours := tuple(expected[key].shape)):
            where = f"{source}: the shape of {key} is {theirs}, in the model {ours}"
            raise UserError(f"{where}. Load the base model of the adapter, with its number of classes")
    return tensors


def _check_finite(tensors: dict[str, Tensor], where: str | Path) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UserError(f"{where}: {key} contains {tensor.dtype}, not floating-point numbers. Write it again")
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {key} contains NaN or infinity. Train again with a smaller learning rate")
