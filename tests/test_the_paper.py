"""The LoRA paper, claim by claim, in its own order (Hu et al. 2021, arXiv:2106.09685); then three of its successors.

Each test is named as what it shows, says where the claim stands, and uses nothing that is not in this project. Read from
top to bottom it is the paper's argument; where the paper says "roughly", the test says what holds exactly, and when.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora import LoraConfig, LoRALinear, PeftModel, get_peft_model
from model import DistilBertConfig, DistilBertForSequenceClassification
from training.optimizer import AdamW, parameter_groups, schedule

pytestmark = pytest.mark.usefixtures("one_thread")
Q_V = ["q_lin", "v_lin"]
ATTENTION = ["q_lin", "k_lin", "v_lin", "out_lin"]
D, LAYERS, LENGTH = 32, 2, 40  # of the small DistilBERT: its width, its layers, and the longest text that it reads


def encoder() -> DistilBertForSequenceClassification:
    """A "pretrained" DistilBERT, the same every time, whose weights are so large that each of them matters."""
    torch.manual_seed(0)
    none = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    shape = {"vocab_size": 99, "max_position_embeddings": LENGTH, "dim": D, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64}
    model = DistilBertForSequenceClassification(DistilBertConfig(**shape, **none, num_labels=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def adapted(base: nn.Module | None = None, **options) -> PeftModel:
    """LoRA on the query and value projections, as in most of the paper, and no head beside it: Theta is all that is trained."""
    defaults = {"r": 2, "lora_alpha": 16, "target_modules": Q_V, "task_type": None}
    return get_peft_model(base or encoder(), LoraConfig(**defaults | options))


def beside(weight: Tensor, **options) -> LoRALinear:
    """LoRA beside one frozen matrix, all in the type of that matrix."""
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight = nn.Parameter(weight.clone())
    defaults = {"target_modules": ["0"], "task_type": None}
    return get_peft_model(nn.Sequential(linear), LoraConfig(**defaults | options)).to(weight.dtype).base_model[0]


def layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def perturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give A, B and whatever else is trained other values, as training would: at B = 0 most claims hold for nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def texts(batch: int = 4, length: int = 12) -> Tensor:
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(texts())


def finetune(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float = 1e-2,
    ratio: float = 1.0,
    decay: float = 0.0,
) -> None:
    """Train what is trainable with AdamW, at a rate that falls to zero."""
    optimizer = AdamW(parameter_groups(model, rate, ratio), weight_decay=decay)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step, steps, warmup=0.0)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def classification(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(texts()), torch.tensor([0, 1, 2, 3]))


def distance(layer: nn.Linear, target: Tensor) -> Callable[[], Tensor]:
    """||W - target||^2 / 2, with W as the layer's outputs for the unit vectors show it: a task with a known solution."""
    return lambda: (layer(torch.eye(layer.in_features, dtype=target.dtype)).T - target).square().sum() / 2


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Record(TorchDispatchMode):
    """Every operation that is computed within the block, as (its name, the shapes that it takes)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tuple(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))
        self.operations.append((str(func), shapes))
        return func(*args, **(kwargs or {}))

    def products(self) -> list[tuple]:
        """The shapes of the two matrices in each matrix product."""
        return [shapes[-2:] for name, shapes in self.operations if name in ("aten.mm.default", "aten.addmm.default")]

    def multiplications(self) -> int:
        return sum(rows * inner * columns for (rows, inner), (_, columns) in self.products())


# Section 2: what is wanted


def test_the_parameters_of_a_task_are_a_small_share_of_those_of_the_model():
    """Equation 2: |Theta| << |Phi_0|, here for DistilBERT itself with r = 2."""
    with torch.device("meta"):
        model = adapted(DistilBertForSequenceClassification(DistilBertConfig(num_labels=4)))
    theta, everything = model.get_nb_trainable_parameters()
    assert theta == 36_864
    assert everything - theta == 66_956_548
    assert theta / (everything - theta) < 0.0006


def test_the_gradient_goes_to_theta_alone_and_phi_0_is_the_same_bit_for_bit_after_training():
    """Equation 2 maximises over Theta; weight decay, which needs no gradient, has no hold on Phi_0 either."""
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finetune(model, classification(model), steps=3, decay=0.1)
    for name, parameter in model.named_parameters():
        in_theta = name.endswith(("lora_A.weight", "lora_B.weight"))
        assert (parameter.grad is not None) == in_theta, name
        assert torch.equal(parameter, before[name]) != in_theta, name


# Section 4.1: the update


def test_the_output_is_that_of_W0_and_that_of_BA_for_the_same_input_added_up():
    """Equation 3: h = W0 x + dW x = W0 x + B A x, with dW x scaled by alpha / r."""
    W0, x = random(7, 5), random(3, 5)  # d_out = 7, d_in = 5: not square, so that nothing fits the wrong way round
    layer = perturb(beside(W0, r=2, lora_alpha=6))
    A, B = layer.lora_A.weight, layer.lora_B.weight
    assert (A.shape, B.shape) == ((2, 5), (7, 2))
    for row, h in zip(x, layer(x), strict=True):
        torch.testing.assert_close(h, W0 @ row + 6 / 2 * (B @ (A @ row)))


def test_the_two_matrices_are_not_each_others_transposes_where_d_in_is_d_out():
    """Equation 3 again, where a mistake fits: in a square layer A^T B^T x has the shape of B A x, and also starts at zero."""
    x = random(3, 6)
    layer = perturb(beside(random(6, 6), r=2, lora_alpha=2))
    torch.testing.assert_close(layer(x) - x @ layer.weight.T, x @ layer.delta_weight().T)
    assert not torch.allclose(layer.delta_weight(), layer.delta_weight().T, atol=0.1)


def test_dW_is_zero_at_the_beginning_so_that_training_starts_at_the_pretrained_model():
    """Section 4.1: A random, B zero. Equal logits, not close ones: zero is added."""
    base = encoder()
    expected = logits(base)
    model = adapted(base)
    for layer in layers(model):
        assert layer.lora_A.weight.any()
        assert not layer.delta_weight().any()
    assert torch.equal(logits(model), expected)


def test_the_first_step_is_that_of_full_finetuning_seen_through_A():
    """What that start implies: with G = dL/dW, dL/dA = 0 and dL/dB = s G A^T, so that one step of SGD makes
    dW = -lr s^2 G A^T A. Of full fine-tuning's -lr G, the rows are projected onto what A sees, and s^2 is in the rate."""
    x, target, rate = random(20, 6), random(20, 8, seed=4), 0.1
    layer = beside(random(8, 6), r=2, lora_alpha=6)
    A, s = layer.lora_A.weight.detach().clone(), layer.scaling
    G = (layer(x) - target).detach().T @ x
    ((layer(x) - target).square().sum() / 2).backward()
    assert not layer.lora_A.weight.grad.any()
    sgd(layer, rate)
    torch.testing.assert_close(layer.delta_weight(), -rate * s**2 * G @ A.T @ A)


def sgd(layer: LoRALinear, rate: float) -> None:
    with torch.no_grad():
        for parameter in trained(layer).values():
            parameter -= rate * parameter.grad


def test_dW_has_rank_r_however_long_it_is_trained():
    """Section 4.1: dW = B A is constrained, and full fine-tuning towards the same target is not."""
    W0, target = random(8, 6), random(8, 6, seed=4)
    for r in (1, 2, 5):
        layer = beside(W0, r=r)
        finetune(layer, distance(layer, target), steps=50)
        assert torch.linalg.matrix_rank(layer.delta_weight()) == r
    full = nn.Linear(6, 8, bias=False, dtype=torch.float64)
    full.weight.data = W0.clone()
    finetune(full, distance(full, target), steps=50)
    assert torch.linalg.matrix_rank(full.weight - W0) == 6


def first_order_gain(r: int, adam: bool, **options) -> float:
    """By how much the first step lowers the loss, to first order: -<G, dW>, where G = dL/dW."""
    torch.manual_seed(r)
    G = random(400, 400)
    layer = beside(torch.zeros_like(G), r=r, lora_alpha=16, **options)
    loss = (layer(torch.eye(400, dtype=G.dtype)).T * G).sum()
    if adam:
        finetune(layer, lambda: loss, steps=1, rate=1e-3)
    else:
        loss.backward()
        sgd(layer, 1e-3)
    return -(G * layer.delta_weight()).sum().item()


def test_scaled_by_alpha_over_r_the_first_step_of_adam_gains_as_much_for_any_r():
    """Section 4.1: the scaling "helps to reduce the need to retune hyperparameters when we vary r".

    Under Adam, exactly in expectation: each of the r rows of A adds to the gain as much as every other, and the sum is
    divided by r. (Not so under SGD, whose step has another factor of alpha / r in it: see rsLoRA below.)
    """
    gains = [first_order_gain(r, adam=True) for r in (4, 16, 64)]
    assert min(gains) > 0
    assert max(gains) == pytest.approx(min(gains), rel=0.05)


def test_to_tune_alpha_is_to_tune_the_learning_rate_if_the_start_of_A_is_scaled():
    """Section 4.1: under Adam "tuning alpha is roughly the same as tuning the learning rate if we scale the initialization
    appropriately". Exactly (but for Adam's epsilon): c^2 alpha with A / c at the start trains as a rate of c lr does."""
    W0, target, c = random(8, 6), random(8, 6, seed=4), 4.0

    def update(alpha: float, shrink: float, rate: float) -> Tensor:
        torch.manual_seed(0)
        layer = beside(W0, r=2, lora_alpha=alpha)
        layer.lora_A.weight.data /= shrink
        finetune(layer, distance(layer, target), steps=30, rate=rate)
        return layer.delta_weight().detach()

    expected = update(alpha=2, shrink=1, rate=1e-3 * c)
    torch.testing.assert_close(update(alpha=2 * c**2, shrink=c, rate=1e-3), expected, rtol=1e-5, atol=1e-6)
    not_scaled = update(alpha=2 * c**2, shrink=1, rate=1e-3)
    assert (not_scaled - expected).norm() > expected.norm()


# Section 4.1: a generalisation of full fine-tuning


def test_as_r_grows_training_LoRA_converges_to_training_the_original_model():
    """Section 4.1. Of the change that a task wants, LoRA finds the best part that has its rank (Eckart and Young 1936):
    what is missing is the singular values after the r-th, and with r = d nothing, as in full fine-tuning."""
    W0, (U, _, V) = random(6, 6), torch.linalg.svd(random(6, 6, seed=4))
    change = U @ torch.diag(singular := torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=W0.dtype)) @ V
    for r in (1, 2, 4, 6):
        torch.manual_seed(r)
        layer = beside(W0, r=r, lora_alpha=r)
        finetune(layer, missing := distance(layer, W0 + change), steps=300, rate=0.1)
        assert missing().item() == pytest.approx(singular[r:].square().sum().item() / 2, abs=0.01)


def test_with_full_rank_on_every_matrix_and_all_biases_trained_any_finetuned_model_can_be_reached():
    """Section 4.1: with r as high as the ranks of the weights "we roughly recover the expressiveness of full fine-tuning".
    Roughly: embeddings and the scales of LayerNorm stay what they were."""
    finetuned = encoder()
    with torch.no_grad():
        for name, parameter in finetuned.named_parameters():
            if "embeddings." not in name and not name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model = adapted(r=D, lora_alpha=16, target_modules=[*ATTENTION, "lin1", "lin2", "pre_classifier", "classifier"], bias="all")
    before = logits(model)
    with torch.no_grad():
        for name, module in model.base_model.named_modules():
            if isinstance(module, LoRALinear):
                dW = (finetuned.get_submodule(name).weight - module.weight) / module.scaling
                A, B = (torch.eye(D), dW) if module.in_features == D else (dW, torch.eye(D))
                module.lora_A.weight.copy_(A)
                module.lora_B.weight.copy_(B)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(finetuned.get_submodule(name).bias)
    torch.testing.assert_close(logits(model), logits(finetuned), atol=1e-4, rtol=1e-4)
    assert (logits(model) - before).abs().max() > 0.1


# Sections 3 and 4.1: no additional inference latency


@torch.no_grad()
def computed(model: nn.Module, input_ids: Tensor) -> Record:
    with Record() as record:
        model(input_ids)
    return record


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
@pytest.mark.parametrize(("batch", "length"), [(1, 12), (1, LENGTH), (8, 12)])
def test_merged_it_computes_the_operations_of_the_pretrained_model_one_by_one_and_no_other(options, batch, length):
    """Section 4.1: no latency "by construction". Section 3: no depth, which hurts at batch size 1, and no part of the
    length, of which prefixes take some: the same operations in the same order, on the same shapes."""
    base, input_ids = encoder(), texts(batch, length)
    pretrained, expected = logits(base), computed(base, input_ids).operations
    model = perturb(adapted(base, **options))
    answers = logits(model)
    assert len(computed(model, input_ids).operations) > len(expected)
    for merge in (model.merge_adapter, model.merge_and_unload):
        merged = merge() or model
        assert computed(merged, input_ids).operations == expected
        torch.testing.assert_close(logits(merged), answers, atol=1e-4, rtol=1e-4)  # for it is "inference as usual"
    assert (answers - pretrained).abs().max() > 0.1


def test_unmerged_each_adapted_matrix_costs_two_thin_products_more():
    """Section 4.1: what merging saves: A x and B (A x), with r as one of their dimensions."""
    base = encoder()
    expected = Counter(computed(base, texts()).products())
    more = Counter(computed(adapted(base, r=3), texts()).products()) - expected
    assert more.total() == 2 * len(Q_V) * LAYERS
    assert all(3 in (*left, *right) for left, right in more)


def test_another_task_is_had_by_taking_BA_out_of_the_weights_and_adding_another_one(tmp_path):
    """Sections 1 and 4.1: one pretrained model for many tasks; W0 comes back by subtraction to rounding, here bit for bit."""
    expected = {}
    for seed, task in enumerate(["one", "other"]):
        model = perturb(adapted(), seed)
        model.save_pretrained(tmp_path / task)
        expected[task] = logits(model)
    assert (expected["one"] - expected["other"]).abs().max() > 0.1

    model = PeftModel.from_pretrained(encoder(), tmp_path / "one")
    W0 = [layer.weight.clone() for layer in layers(model)]
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected["one"], atol=1e-4, rtol=1e-4)
    for layer, original in zip(layers(model), W0, strict=True):
        torch.testing.assert_close(layer.weight - layer.delta_weight(), original, atol=1e-6, rtol=1e-5)

    model.load_adapter(tmp_path / "other")
    assert all(torch.equal(layer.weight, original) for layer, original in zip(layers(model), W0, strict=True))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected["other"], atol=1e-4, rtol=1e-4)


# Section 4.2: practical benefits


def test_only_attention_is_adapted_and_what_is_not_adapted_is_frozen():
    """Section 4.2: the MLP is frozen; so are, here, LayerNorms, biases and embeddings."""
    model = adapted(target_modules=ATTENTION)
    for name in trained(model):
        assert ".attention." in name
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
    assert len(trained(model)) == 2 * len(ATTENTION) * LAYERS


def test_the_optimizer_keeps_state_for_theta_only():
    """Section 4.2: "we do not need to store the optimizer states for the frozen parameters": two numbers for each of Theta."""

    def numbers_kept(model: nn.Module) -> int:
        optimizer = AdamW(parameter_groups(model, 1e-3, 1.0), weight_decay=0.0)
        return sum(state["mean"].numel() + state["square"].numel() for state in optimizer.state.values())

    base = encoder()
    everything = sum(parameter.numel() for parameter in base.parameters())
    assert numbers_kept(base) == 2 * everything
    model = adapted(base)
    assert numbers_kept(model) == 2 * model.get_nb_trainable_parameters()[0] < 2 * everything / 40


def test_the_gradient_of_the_frozen_weights_is_not_computed():
    """Section 4.2: hence the speedup. Of the two products that go back through a linear layer, the one for W0 is left out."""

    def going_back(model: nn.Module) -> int:
        loss = classification(model)()
        with Record() as record:
            loss.backward()
        return record.multiplications()

    assert going_back(adapted()) < 0.6 * going_back(encoder())


def test_the_checkpoint_holds_theta_and_nothing_else(tmp_path):
    """Section 4.2: the checkpoint shrinks as the trained parameters do: four bytes for each, behind a table of contents."""
    model = perturb(adapted())
    model.save_pretrained(tmp_path)
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    table = int.from_bytes(content[:8], "little")
    assert len(content) - 8 - table == 4 * model.get_nb_trainable_parameters()[0]
    saved = safetensors.torch.load(content).values()
    assert sorted(tensor.norm().item() for tensor in saved) == sorted(p.norm().item() for p in trained(model).values())


# Section 5.1: how many


@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("targets", [["q_lin"], Q_V, ATTENTION], ids=lambda targets: ", ".join(targets))
def test_theta_has_2_L_d_r_parameters(r, targets):
    """Section 5.1: |Theta| = 2 x L x d_model x r, where L counts the adapted matrices."""
    theta, _ = adapted(r=r, target_modules=targets).get_nb_trainable_parameters()
    assert theta == 2 * (len(targets) * LAYERS) * D * r


# Section 7: what is learned


def test_a_low_and_a_high_rank_learn_the_same_first_direction_and_no_other():
    """Section 7.2, equation 4: phi = ||U_1^T U_2||^2 / min(i, j), from 0 for orthogonal subspaces to 1 for equal ones."""
    W0 = random(16, 16)
    u, v = (F.normalize(random(16, seed=seed), dim=0) for seed in (4, 5))

    def directions(r: int) -> Tensor:
        torch.manual_seed(r)
        layer = beside(W0, r=r, lora_alpha=r)
        finetune(layer, distance(layer, W0 + 20 * torch.outer(u, v)), steps=200, rate=0.05)
        return torch.linalg.svd(layer.lora_A.weight.detach()).Vh

    def phi(one: Tensor, other: Tensor) -> float:
        return ((one @ other.T).square().sum() / min(len(one), len(other))).item()

    low, high = directions(2), directions(8)
    assert phi(low[:1], high[:1]) > 0.9
    assert phi(low[:1], v[None]) > 0.9
    assert phi(low[1:2], high[1:2]) < 0.5
    assert phi(high, high) == pytest.approx(1.0)


def test_dW_amplifies_directions_that_W0_has_but_does_not_emphasise():
    """Section 7.3: the amplification ||dW|| / ||U^T W0 V||, where U and V are dW's directions."""
    U, _, V = torch.linalg.svd(random(8, 8))
    W0 = U @ torch.diag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1], dtype=U.dtype)) @ V
    task = W0 + 20 * torch.outer(U[:, 7], V[7])  # what W0 has least of is what this task needs
    torch.manual_seed(0)
    layer = beside(W0, r=1, lora_alpha=1)
    finetune(layer, distance(layer, task), steps=300, rate=0.1)
    dW = layer.delta_weight().detach()
    left, _, right = torch.linalg.svd(dW)
    amplification = dW.norm() / (left[:, :1].T @ W0 @ right[:1].T).norm()
    assert amplification.item() == pytest.approx(20, rel=0.01)


# rsLoRA: Kalajdzievski 2023, arXiv:2312.03732


def test_alpha_over_the_root_of_r_keeps_learning_stable_where_alpha_over_r_lets_it_vanish():
    """Theorem 3.2 there: with alpha / sqrt(r), outputs and the gradients of inputs neither vanish nor explode as r grows.

    By what the first step of SGD gains, which is dW x along what the loss asks of the outputs, and G^T dW along x. As seen
    above, dW = -lr s^2 G A^T A, and A^T A grows as r does, so that s^2 has to fall as 1 / r, and no faster.
    """
    stable, vanishing = ([first_order_gain(r, adam=False, use_rslora=rs) for r in (4, 16, 64)] for rs in (True, False))
    assert stable == pytest.approx([stable[0]] * 3, rel=0.05)
    assert vanishing == pytest.approx([vanishing[0], vanishing[0] / 4, vanishing[0] / 16], rel=0.05)


# DoRA: Liu et al. 2024, arXiv:2402.09353


def test_dora_starts_as_the_pretrained_weight_with_its_lengths_as_m():
    """Equation 5 there: W' = m (W0 + B A) / ||W0 + B A||, with m = ||W0|| and B = 0 at the start."""
    W0 = random(7, 5)
    layer = beside(W0, r=2, use_dora=True)
    torch.testing.assert_close(layer.lora_magnitude_vector, W0.norm(dim=1))
    torch.testing.assert_close(layer.merged_weight(), W0)


def test_in_dora_A_and_B_turn_the_weights_and_m_alone_makes_them_long():
    """Section 4.1 there: length and direction are apart, where LoRA changes both at once."""
    layer = perturb(beside(random(7, 5), r=2, lora_alpha=2, use_dora=True))
    m = layer.lora_magnitude_vector.detach().clone()
    before = layer.merged_weight().detach()
    torch.testing.assert_close(before.norm(dim=1), m)

    layer.lora_B.weight.data *= -3
    turned = layer.merged_weight()
    torch.testing.assert_close(turned.norm(dim=1), m)
    assert (F.cosine_similarity(turned, before) < 0.99).all()

    layer.lora_magnitude_vector.data *= 2
    torch.testing.assert_close(layer.merged_weight(), 2 * turned)
    torch.testing.assert_close(layer(random(3, 5)), random(3, 5) @ (2 * turned).T)


# LoRA+: Hayou et al. 2024, arXiv:2402.12354


def test_in_loraplus_B_moves_as_many_times_as_far_as_A_as_its_learning_rate_is_higher():
    """lr_B = lambda lr_A. Adam's first step is as long as the rate for each number that has a gradient, so B's is lambda long
    against A's. (B has to start elsewhere than at zero here, or A had no gradient yet.)"""
    model = adapted(init_lora_weights=False)
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    finetune(model, classification(model), steps=1, rate=1e-3, ratio=16.0)
    moved = {name: (parameter - before[name]).abs().median().item() for name, parameter in trained(model).items()}
    for name, far in moved.items():
        assert far == pytest.approx(16e-3 if "lora_B" in name else 1e-3, rel=0.01), name
