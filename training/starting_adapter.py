"""`--adapter`: a run that starts from a trained adapter, ours or peft's, in place of B = 0."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.files import read_json, sha256_of_file
from lora import NO_TARGETS, LoraConfig, PeftModel, get_peft_model_state_dict
from lora.adapter import FILES, PREFIX, WEIGHTS_FILE, match_tensors, read_adapter
from lora.config import CONFIG_FILE
from training.options import ADAPTER_OPTIONS, Options, flag
from training.run_folder import require_ended
from training.trained_folder import LABELS_FILE, count_classes, run_results

HEAD = (f"{PREFIX}pre_classifier.", f"{PREFIX}classifier.")


def with_adapter(typed: dict[str, Any]) -> dict[str, Any]:
    """The typed options, and, with --adapter, those that its configuration decides: r, alpha, targets, the base model ...

    Raises UserError if the folder holds no adapter to start from, or if a typed option contradicts it.
    """
    if typed.get("adapter") is None:
        return typed
    require_ended(Path(typed["adapter"]))
    folder = adapter_folder(typed["adapter"])
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        raise UserError(f"--adapter {folder} is a whole model. Start from it with --model {folder}")
    config, _ = read_adapter(folder)
    if config.target_modules in (None, NO_TARGETS):
        raise UserError(f"--adapter {folder} names no target_modules: it has no A and B to start from")
    decided = {name: getattr(config, name) for name in ADAPTER_OPTIONS}
    if isinstance(config.target_modules, str):  # a regular expression
        decided["target_modules"] = [config.target_modules]
    for name, value in decided.items():
        wanted = typed.get(name, value)
        if set(wanted) != set(value) if isinstance(value, list) else wanted != value:
            difference = f"{flag(name)} is {words(typed[name])}, but the adapter in {folder} has {words(value)}"
            raise UserError(f"{difference}. Leave the option out")
    base = {"model": config.base_model_name_or_path, "revision": config.revision}
    if base["model"] is None and "model" not in typed:
        raise UserError(f"{folder} does not name its base model. Pass it with --model")
    free = {"lora_dropout": config.lora_dropout} | ({} if "model" in typed else base)
    return free | typed | decided


def adapter_folder(path: str) -> Path:
    """The folder of the adapter, if `path` is one or a run."""
    folder = Path(path)
    is_run = not (folder / CONFIG_FILE).is_file() and (folder / "adapter").is_dir()
    return folder / "adapter" if is_run else folder


def words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class StartingAdapter:
    path: Path  # of the file with the tensors
    config: LoraConfig
    tensors: dict[str, Tensor]  # by their keys in the file
    with_head: bool  # else the head is a new one
    sha256: str  # of the adapter's two files

    def copy_to(self, model: PeftModel) -> None:
        """Give the adapter in `model` the values of this one. Raises UserError if they do not fit."""
        present = get_peft_model_state_dict(model)
        new_head = {} if self.with_head else {key: value for key, value in present.items() if key.startswith(HEAD)}
        for key, tensor in match_tensors(present, self.tensors | new_head, self.path).items():
            present[key].copy_(tensor)


def read_starting_adapter(options: Options, label_names: list[str], weights_sha256: str) -> StartingAdapter:
    """The adapter that the options name. Prints whether its head comes along, as it does if it is for the same classes.

    weights_sha256: of the base model. Raises UserError for an adapter of another network, or if its base was replaced.
    """
    folder = adapter_folder(options.adapter or "")
    config, tensors = read_adapter(folder)
    recorded = run_results(folder).get("sha256")
    trained_on = recorded.get("weights") if isinstance(recorded, dict) else None
    named = config.base_model_name_or_path
    if options.model == named and trained_on not in (None, weights_sha256):
        remedy = "Restore them, or name their commit with --revision"
        raise UserError(f"the weights of {named} are not those that the adapter in {folder} was trained on. {remedy}")
    if options.model != named and trained_on != weights_sha256:
        print(f"the adapter in {folder} was trained on {named}; this run trains it on {options.model}")

    number = count_classes(folder, tensors)
    names = [str(name) for name in read_json(folder / LABELS_FILE, list)] if (folder / LABELS_FILE).is_file() else None
    with_head = number == len(label_names) if names is None else names == label_names
    if not with_head:
        theirs = f"{number} classes" if names is None else ", ".join(names[:10]) + ", ..." * (len(names) > 10)
        print(f"starting from the adapter in {folder} with a new head: its own is for {theirs}")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(HEAD)}
    else:
        unnamed = f". Its {number} classes have no names: they are taken for these, in this order" * (names is None)
        print(f"starting from the adapter in {folder} and its head{unnamed}")
    digest = hashlib.sha256("".join(sha256_of_file(folder / name) for name in FILES).encode()).hexdigest()
    config = replace(config, lora_dropout=options.lora_dropout, inference_mode=False)
    return StartingAdapter(folder / WEIGHTS_FILE, config, tensors, with_head, digest)
