"""The training loop of train.py against a plain one of a dozen lines that computes whole batches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import TokenizedTexts, pad, training_batches
from lora import LoraConfig, PeftModel, get_peft_model
from lora.adapter import adapter_tensors
from model import DistilBertConfig, DistilBertForSequenceClassification
from train import train
from training.checkpoint import Checkpoints
from training.distributed import Distributed
from training.evaluation import Examples, ModelRunner
from training.optimizer import lr_multiplier, parameter_groups
from training.options import Options
from training.signals import Signals
from training.validation import Validation

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = Options(batch_size=8, epochs=2, learning_rate=3e-3, weight_decay=0.1, loraplus_lr_ratio=2.0)
rng = np.random.default_rng(0)
LENGTHS = rng.integers(3, 13, size=28)
TEXTS = TokenizedTexts(rng.integers(5, 99, size=LENGTHS.sum(), dtype=np.int32), np.cumsum([0, *LENGTHS]))
LABELS = rng.integers(3, size=28)
STEPS = 8  # of batches of 8, 8, 8 and 4, twice


def new_model() -> PeftModel:
    """Without dropout, so that the numbers do not depend on how a batch is cut."""
    torch.manual_seed(0)
    none = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    shape = {"vocab_size": 99, "max_position_embeddings": 12, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    base = DistilBertForSequenceClassification(DistilBertConfig(**shape, **none, num_labels=3))
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=16, target_modules=["q_lin", "v_lin"]))


def plain_loop(model: PeftModel) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, OPTIONS.learning_rate, OPTIONS.loraplus_lr_ratio), weight_decay=0.1)
    step = 0
    for epoch in range(OPTIONS.epochs):
        for batch in training_batches(LENGTHS, OPTIONS.batch_size, OPTIONS.seed, epoch):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_multiplier(step, STEPS, OPTIONS.warmup)
            optimizer.zero_grad()
            F.cross_entropy(model(*pad(TEXTS, batch)), torch.from_numpy(LABELS[batch])).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()


@pytest.mark.parametrize("tokens", [10, 30, 10_000], ids=["a text at a time", "in micro-batches", "whole batches"])
def test_micro_batches_train_as_a_plain_loop_does(tokens, tmp_path):
    plain, model = new_model(), new_model()
    plain_loop(plain)
    runner = ModelRunner(model, torch.device("cpu"), torch.float32)
    runner.tokens = tokens
    checkpoints = Checkpoints(tmp_path, None, {}, write=False)
    processes = Distributed()
    without = Validation(runner, None, 3, processes, None)
    measured = train(runner, Examples(TEXTS, LABELS), without, OPTIONS, processes, checkpoints, Signals(tmp_path))
    assert measured["steps"] == STEPS
    fresh = adapter_tensors(new_model().base_model)
    expected = adapter_tensors(plain.base_model)
    for key, tensor in adapter_tensors(model.base_model).items():
        assert (expected[key] - fresh[key]).abs().max() > 1e-3, key
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
