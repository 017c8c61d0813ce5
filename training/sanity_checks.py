"""What LoRA promises (arXiv:2106.09685, section 4.1), seen on the real model before it is trained."""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import TokenizedTexts, micro_batches
from lora import LoRALinear, PeftModel
from lora.modules_to_save import ModulesToSaveWrapper
from training.checkpoint import sha256
from training.evaluation import ModelRunner

SOME = 8  # of the first texts are enough


def identities(forward: ModelRunner, texts: TokenizedTexts, labels: np.ndarray) -> list[str]:
    """A line for each promise that the model can keep, with what was found. Leaves no gradient behind."""
    model, lines = forward.model.eval(), []
    few = micro_batches(texts.lengths, np.arange(min(SOME, len(labels))), forward.tokens)[0]
    logits = forward(texts, few)
    if isinstance(model, PeftModel):
        with torch.no_grad(), model.disable_adapter():
            change = (forward(texts, few) - logits).abs().max().item()
        lines.append(f"injecting changed the logits by {change}")

    F.cross_entropy(logits, forward.move(torch.from_numpy(labels[few]))).backward()
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    lines.append(where_gradients_go(model, layers))
    if layers:
        zero_A = sum(not layer.lora_A.weight.grad.any() for layer in layers)  # type: ignore[union-attr]
        zero_B = sum(not layer.lora_B.weight.grad.any() for layer in layers)  # type: ignore[union-attr]
        lines.append(f"the first gradient is exactly 0 for {zero_A} of {len(layers)} A, since B = 0, and for {zero_B} B")
    for parameter in model.parameters():
        parameter.grad = None
    return lines


def where_gradients_go(model: nn.Module, layers: list[LoRALinear]) -> str:
    kinds: dict[torch.Tensor, str] = {layer.lora_A.weight: "A" for layer in layers}
    kinds |= {layer.lora_B.weight: "B" for layer in layers}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            kinds |= dict.fromkeys(module.trained_module.parameters(), "of the head")
    reached = {parameter for parameter in model.parameters() if parameter.grad is not None}
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    counts = Counter(kinds.get(parameter, "more") for parameter in model.parameters() if parameter in reached)
    which = ", ".join(f"{count} {kind}" for kind, count in counts.items()) if kinds else "all there are"
    if reached != trained:
        return f"gradients reach {len(reached)} tensors ({which}), and {len(trained)} are trained"
    return f"gradients reach exactly the {len(trained)} tensors that are trained: {which}"


def frozen_sha256(model: nn.Module) -> str | None:
    """Of the values of everything that is not trained; None if all is."""
    frozen = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if not value.requires_grad}
    return sha256("", frozen) if frozen else None
