"""Checks on the real model: LoRA's promises (arXiv:2106.09685, section 4.1), and that loss and gradients stay finite."""

import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from data import micro_batches
from lora import LoRALinear, PeftModel
from lora.modules_to_save import ModulesToSaveWrapper
from training.checkpoint import sha256
from training.evaluation import Examples, ModelRunner
from training.optimizer import trained_parameters
from training.options import Options, flag

CHECK_EXAMPLES = 8  # a few are enough


def lora_checks(runner: ModelRunner, examples: Examples, adapter: str | None = None) -> list[str]:
    """One line per promise, with the measured value. Leaves no gradient behind.

    1. B = 0, so adding LoRA has not changed the logits.
    2. Gradients reach exactly the trained tensors.
    3. The first gradient of A is exactly zero, because B is a factor of it. The first gradient of B is not zero.

    With --adapter B is not zero, so 1 and 3 do not hold; the lines then say how far the adapter moves the logits.
    """
    model, lines = runner.model.eval(), []
    texts, labels = examples
    micro_batch = micro_batches(texts.lengths, np.arange(min(CHECK_EXAMPLES, len(labels))), runner.tokens)[0]
    logits = runner(texts, micro_batch)
    if isinstance(model, PeftModel):
        with torch.no_grad(), model.disable_adapter():
            change = (runner(texts, micro_batch) - logits).abs().max().item()
        cause = "injection" if adapter is None else f"the adapter in {adapter}"
        lines.append(f"{cause} changed the logits by {change}")

    F.cross_entropy(logits, runner.to_device(torch.from_numpy(labels[micro_batch]))).backward()
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    lines.append(gradient_line(model, layers))
    if layers:
        zero_A = sum(not layer.lora_A.weight.grad.any() for layer in layers)  # type: ignore[union-attr]
        zero_B = sum(not layer.lora_B.weight.grad.any() for layer in layers)  # type: ignore[union-attr]
        n = len(layers)
        why = " (because B = 0)" if adapter is None else ""
        lines.append(f"the first gradient is exactly 0 for {zero_A} of {n} A{why} and for {zero_B} of {n} B")
    model.zero_grad(set_to_none=True)
    return lines


def gradient_line(model: nn.Module, layers: list[LoRALinear]) -> str:
    kinds: dict[Tensor, str] = {layer.lora_A.weight: "A" for layer in layers}
    kinds |= {layer.lora_B.weight: "B" for layer in layers}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            kinds |= dict.fromkeys(module.trained_module.parameters(), "head")
    reached = {parameter for parameter in model.parameters() if parameter.grad is not None}
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    counts = Counter(kinds.get(parameter, "other") for parameter in model.parameters() if parameter in reached)
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items()) if kinds else "all of the model"
    if reached != trained:
        return f"gradients reach {len(reached)} tensors ({listed}), but {len(trained)} are trained"
    return f"gradients reach exactly the {len(trained)} trained tensors: {listed}"


def frozen_sha256(model: nn.Module) -> str | None:
    """The sha256 of all frozen parameters; None if everything is trained."""
    trained = trained_parameters(model)
    frozen = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if name not in trained}
    return sha256("", frozen) if frozen else None


def refuse_not_finite(loss: float, gradient_norm: float, step: int, batch: np.ndarray, options: Options) -> None:
    """Raises UserError, with step, examples and settings, if the loss or the gradient is NaN or infinite."""
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return
    symptom = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {gradient_norm}"
    rows = ", ".join(str(i + 1) for i in sorted(batch.tolist()))
    typed = ", ".join(f"{flag(name)} {getattr(options, name)}" for name in ("learning_rate", "lora_alpha", "r", "dtype"))
    where = f"at step {step}, on the training examples {rows} (counted from 1), with {typed}"
    remedy = "Try a smaller --learning-rate, or --dtype float32. The last checkpoint is from before this step"
    raise UserError(f"{symptom} {where}. {remedy}")
