"""fast_cpu.py computes what torch computes: the same numbers, and for dropout the same chances."""

import math
import platform
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lora import LoraConfig, get_peft_model
from lora.layer import LoRALinear
from lora.variants import DoRALinear
from model import DistilBertConfig, DistilBertForSequenceClassification
from training import fast_cpu
from training.device import cast_frozen_matrices
from training.fast_cpu import FEW_ROWS, BFloat16Weight, Fast, Float32Weight, Int8Weight, attention, can_pack, dropout

bfloat16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not can_pack(), reason="no bfloat16 products here"))


int8 = pytest.param(torch.int8, marks=pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86"))


def small_model(dropout: float, dtype: torch.dtype = torch.float32, **variant: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=100, dim=64, n_layers=3, n_heads=4, hidden_dim=128, dropout=dropout, attention_dropout=dropout,
        seq_classif_dropout=dropout, num_labels=3,
    )  # fmt: skip
    options = {"r": 2, "lora_alpha": 16, "lora_dropout": dropout, "target_modules": ["q_lin", "v_lin"]} | variant
    model = get_peft_model(DistilBertForSequenceClassification(config), LoraConfig(**options)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None and not module.weight.requires_grad:
            torch.nn.init.normal_(module.weight, std=0.1)  # as large as trained ones are, so that each layer counts
            torch.nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight, std=0.1)
        if isinstance(module, DoRALinear):
            module.lora_magnitude_vector.data *= 2
    cast_frozen_matrices(model, dtype)
    return model


def logits_and_gradients(model, dtype, mode=None):
    ids = torch.randint(1, 100, (6, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(11) < torch.tensor([11, 11, 7, 5, 3, 2])[:, None]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        if mode is None:
            logits = model(ids, mask).float()
        else:
            with mode:
                logits = model(ids, mask).float()
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="lora"),
        pytest.param({"bias": "all"}, id="biases"),
        pytest.param({"use_dora": True, "lora_dropout": 1e-9}, id="dora"),  # with dropout, DoRA computes W0 x once more
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, bfloat16, int8])
def test_without_dropout_logits_and_gradients_are_equal(dtype, variant):
    model = small_model(0.0, dtype, **variant)
    plain, plain_gradients = logits_and_gradients(model, dtype)
    quick, quick_gradients = logits_and_gradients(model, dtype, Fast(model, dtype))
    # rounding flips a ReLU of the head here and there: in 8 bits, and in 16 with DoRA. With W0 x + b for W0 x, gradients
    # are 0.7 off
    tolerance = 1e-6 if dtype == torch.float32 else 0.3 if dtype == torch.int8 or "use_dora" in variant else 0.05
    assert dtype == torch.float32 or not torch.equal(quick, plain)
    assert plain.abs().max() > 0.03
    torch.testing.assert_close(quick, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())
    assert quick_gradients.keys() == plain_gradients.keys()
    least = (0.1 if dtype == torch.int8 else 0.01) * max(gradient.norm() for gradient in plain_gradients.values())
    for name, gradient in plain_gradients.items():  # that of a bias of k_lin is 0 but for rounding: softmax does not see it
        assert (quick_gradients[name] - gradient).norm() <= tolerance * max(gradient.norm(), least), name


def test_autocast_does_not_round_dW_or_the_magnitude():
    layer = DoRALinear(torch.nn.Linear(16, 8, bias=False).bfloat16(), r=2, lora_alpha=16)
    torch.nn.init.normal_(layer.lora_B.weight)
    layer.reset_magnitude()
    dW, x = layer.delta_weight(), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(layer.delta_weight(), dW)
        before = layer(x)
        layer.lora_magnitude_vector *= 1.003  # less than one step of bfloat16 at 1
        learnt = layer(x)
    assert (learnt.float() / before.float()).mean().item() == pytest.approx(1.003, abs=0.001)


@pytest.mark.skipif(not can_pack(), reason="no bfloat16 products here")
def test_exactly_the_frozen_linear_layers_are_packed(monkeypatch):
    model = small_model(0.1, torch.bfloat16)
    mode, products = Fast(model, torch.bfloat16), []
    assert len(mode.packed) == 3 * 6 + 2  # three layers of six, and the originals of the head, which nobody computes
    monkeypatch.setattr(
        BFloat16Weight,
        "product",
        lambda self, x, bias=None, product=BFloat16Weight.product: products.append(1) or product(self, x, bias),
    )
    logits_and_gradients(model, torch.bfloat16, mode)
    # backwards: nothing of the first layer's q, k and v, whose input is not trained
    assert len(products) == 3 * 6 + (3 * 6 - 3)


@pytest.mark.skipif(not can_pack(), reason="no bfloat16 products here")
def test_a_weight_replaced_after_packing_is_used():
    model = small_model(0.0, torch.bfloat16).eval()
    mode = Fast(model, torch.bfloat16)
    before, _ = logits_and_gradients(model, torch.bfloat16, mode)
    layer = [module for module in model.modules() if isinstance(module, LoRALinear)][-1]
    torch.nn.init.normal_(layer.lora_B.weight, std=1.0)
    with torch.no_grad():
        layer.merge()
    plain, _ = logits_and_gradients(model, torch.bfloat16)
    merged, _ = logits_and_gradients(model, torch.bfloat16, mode)
    assert (merged - plain).abs().max() < 0.1 * (merged - before).abs().max()


@pytest.mark.parametrize("dtype", [int8])
def test_int8_rounds_by_one_percent_and_each_row_by_itself(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64) * torch.rand(96, 1), torch.randn(96)
    packed = Int8Weight(weight)
    x = torch.randn(7, 5, 64) * torch.logspace(-6, 6, 5)[:, None]  # rows of very different size
    x[0, 0] = 0
    y, exact = packed.product(x, bias) - bias, F.linear(x, weight)
    error = (y - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-9)
    assert 0.002 < error[:, 3:].mean() < 0.015  # at 1e-6 the bias swallows y
    assert torch.equal(packed.product(x[3:4], bias), packed.product(x, bias)[3:4])
    gradient = torch.randn(7, 96) * torch.logspace(-9, 3, 7)[:, None]
    back = packed.transposed.product(gradient)
    assert ((back - gradient @ weight).norm(dim=-1) / (gradient @ weight).norm(dim=-1)).max() < 0.04


@pytest.mark.parametrize("dtype", [int8])
def test_int8_does_not_overflow_where_products_are_added_in_16_bits(dtype):
    """All values at their largest: two products of 255 and 127 are 64,770, where 32,767 is the most."""
    weight = torch.ones(64, 256)
    torch.testing.assert_close(Int8Weight(weight).product(torch.ones(3, 256)), torch.full((3, 64), 256.0))


@pytest.mark.parametrize("dtype", [int8])
def test_int8_leaves_the_last_layer_of_the_head_alone(dtype):
    mode = Fast(small_model(0.0), torch.int8)
    assert len(mode.packed) == 3 * 6 + 1  # three layers of six, and the original of the pre_classifier


@pytest.mark.parametrize("masked", [True, False])
def test_attention_without_dropout_equals_torch(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    mask = (torch.arange(9) < torch.tensor([9, 4])[:, None])[:, None, None, :] if masked else None
    torch.testing.assert_close(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_each_element_independently(p, dtype):
    torch.manual_seed(0)
    n = 1 << 20
    x = torch.ones(n, dtype=dtype)
    kept = dropout(x, p) != 0
    scale = dropout(x, p).max().item()
    assert scale == pytest.approx(1 / (1 - p), rel=1e-4 if dtype == torch.float32 else 4e-3)
    assert set(dropout(x, p).unique().tolist()) == {0.0, scale}

    def within_chance(share: torch.Tensor, expected: float, count: int) -> bool:
        return abs(share.double().mean().item() - expected) < 5 * math.sqrt(expected * (1 - expected) / count)

    for lane in range(4):  # of the four elements that share a random word
        assert within_chance(kept[lane::4], 1 - p, n // 4)
    for distance in (1, 2, 3, 4, 768):  # two elements are kept together as often as if each were alone
        assert within_chance(kept[:-distance] & kept[distance:], (1 - p) ** 2, n)
    again = dropout(x, p) != 0
    assert within_chance(kept & again, (1 - p) ** 2, n)


def test_dropout_follows_the_seed_and_masks_the_gradient():
    x = torch.full((3, 7, 5), 2.0, requires_grad=True)  # 105 elements: no whole number of random words
    torch.manual_seed(3)
    y = dropout(x, 0.4)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.4), y)
    assert not torch.equal(dropout(x, 0.4), y)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach() / 2)
    assert 20 < int((y == 0).sum()) < 65


def test_dropout_of_zero_or_in_evaluation_returns_its_input():
    x = torch.randn(5)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.5, training=False) is x


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=[*bfloat16.marks, pytest.mark.slow])])
def test_the_model_drops_out_as_torch_does(dtype, monkeypatch):
    model, calls = small_model(0.2, dtype), []
    monkeypatch.setattr(
        fast_cpu, "dropout", lambda *args, drop=fast_cpu.dropout, **kwargs: calls.append(1) or drop(*args, **kwargs)
    )
    mode = Fast(model, dtype)
    torch.manual_seed(0)
    one, other = (logits_and_gradients(model, dtype, mode)[0] for _ in range(2))
    # per pass: embeddings, head; in each of three layers attention, the feed-forward network, and the input of two adapters
    assert len(calls) == 2 * (2 + 3 * 4)
    assert not torch.equal(one, other)
    count = 150
    quick = torch.stack([logits_and_gradients(model, dtype, mode)[0] for _ in range(count)])
    plain = torch.stack([logits_and_gradients(model, dtype)[0] for _ in range(count)])
    error = ((quick.var(dim=0) + plain.var(dim=0)) / count).sqrt()
    assert ((quick.mean(dim=0) - plain.mean(dim=0)).abs() < 5 * error).all()
    assert ((quick.std(dim=0) / plain.std(dim=0)).log().abs() < 5 / count**0.5).all()


def test_a_short_text_is_labelled_with_packed_float32_weights(monkeypatch):
    model, products = small_model(0.0, torch.float32).eval(), []
    mode = Fast(model, torch.float32)
    product = Float32Weight.product
    monkeypatch.setattr(Float32Weight, "product", lambda self, *rest: products.append(1) or product(self, *rest))
    ids = torch.randint(5, 90, (1, 9))
    with torch.inference_mode():
        plain = model(ids)
        with mode:
            torch.testing.assert_close(model(ids), plain, rtol=1e-5, atol=1e-6)
            assert len(products) == 3 * 6
            model(ids.expand(FEW_ROWS, 9))  # the last layer computes one position of each text
            few = len(products) - (3 * 6)
    with mode:
        model(ids).sum().backward()
    assert len(products) == 3 * 6 + few
    assert 0 < few < 3 * 6
