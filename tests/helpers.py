"""Small models, a batch, and adapters with values that matter: what several test files use."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lora import LoraConfig, LoRALinear, PeftModel, get_peft_model
from model import DistilBertConfig, DistilBertForSequenceClassification, save_pretrained
from training.checkpoint import Checkpoints
from training.distributed import Distributed
from training.evaluation import ModelRunner
from training.validation import Validation

Q_V = ["q_lin", "v_lin"]


def base_model(kind: str = "distilbert", dropout: float = 0.0) -> nn.Module:
    """A tiny model of transformers, "distilbert" or "bert", with the same large weights every time. 4 classes."""
    import transformers  # here, so that test_the_paper.py runs without it

    torch.manual_seed(0)
    if kind == "distilbert":
        rates = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
        shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        config = transformers.DistilBertConfig(vocab_size=99, max_position_embeddings=40, num_labels=4, **shape, **rates)
        model = transformers.DistilBertForSequenceClassification(config)
    else:
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=99, max_position_embeddings=40, num_labels=4, **shape, **rates)
        model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1) + (parameter == 1))
    return model.eval()


def save_quick_model(folder: Path, tokenizer_file: Path, num_labels: int) -> Path:
    """A small DistilBERT with random weights and a tenth of the vocabulary, which loads sooner than all of it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 3000, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    model = DistilBertForSequenceClassification(DistilBertConfig(**shape, num_labels=num_labels))
    words = json.loads(tokenizer_file.read_text())
    words["model"]["vocab"] = {word: i for word, i in words["model"]["vocab"].items() if i < 3000}
    save_pretrained(model, Tokenizer.from_str(json.dumps(words)), folder)
    return folder


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    """A fresh adapter on the query and value projections, and a trained head."""
    defaults = {"r": 3, "lora_alpha": 16, "target_modules": Q_V}
    return get_peft_model(base_model() if base is None else base, LoraConfig(**defaults | options))


def perturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every trainable tensor, A and B most. While B is zero an adapter changes nothing, and most claims hold for nothing.

    Beside a trained head a small adapter hardly shows, so a small change would hide a forgotten scale or layer.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if "lora_A" in name or "lora_B" in name else 0.05)
    return model


def batch() -> dict[str, Tensor]:
    """Four texts of up to 15 tokens, padded, with labels."""
    torch.manual_seed(2)
    mask = torch.arange(15) < torch.tensor([15, 7, 11, 3])[:, None]
    return {"input_ids": torch.randint(5, 99, (4, 15)), "attention_mask": mask.long(), "labels": torch.tensor([0, 3, 1, 2])}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """(4, 4), of the batch."""
    inputs = batch()
    output = model(inputs["input_ids"], inputs["attention_mask"])
    return output if isinstance(output, Tensor) else output.logits


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adamw_after_a_step(model: torch.nn.Module) -> torch.optim.AdamW:
    """An optimizer whose state exists. The step changes nothing: every gradient is zero."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def unvalidated(model: nn.Module) -> Validation:
    """Of a run without a validation part."""
    return Validation(ModelRunner(model, torch.device("cpu"), torch.float32), None, 2, Distributed(), None)


def begun(run: Path, model: nn.Module | None = None, metadata: dict[str, Any] | None = None) -> Checkpoints:
    """The checkpoints of a run that has begun: that of step 0 is written."""
    model = model or nn.Linear(2, 2)
    run.mkdir(exist_ok=True)
    checkpoints = Checkpoints(run, 1, metadata or {}, write=True)
    checkpoints.begin(model, adamw_after_a_step(model), unvalidated(model))
    return checkpoints


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A run in this process gets SIGTERM when the checkpoint of `step` is written."""
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, number: int, *state: Any) -> None:
        save(self, number, *state)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
