"""The LoRA paper, claim by claim, in its own order (Hu et al. 2021, arXiv:2106.09685); then three of its successors.

Each test is named after its claim and says where the paper makes it. Read from top to bottom, they are the paper's argument.
Where the paper says "roughly", the test says what holds exactly, and when.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import Q_V, layers, logits, perturb, trainable
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora import LoraConfig, LoRALinear, PeftModel, get_peft_model
from model import DistilBertConfig, DistilBertForSequenceClassification
from training.optimizer import parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")
ATTENTION = ["q_lin", "k_lin", "v_lin", "out_lin"]
D, LAYERS, LENGTH = 32, 2, 40  # the small DistilBERT: width, layers, longest text


def encoder() -> DistilBertForSequenceClassification:
    """A "pretrained" DistilBERT, the same every time. Its weights are large, so that each of them matters."""
    torch.manual_seed(0)
    none = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    shape = {"vocab_size": 99, "max_position_embeddings": LENGTH, "dim": D, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64}
    model = DistilBertForSequenceClassification(DistilBertConfig(**shape, **none, num_labels=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def adapted(base: nn.Module | None = None, **options) -> PeftModel:
    """LoRA on the query and value projections, as in most of the paper. Without a trained head: only Theta is trained."""
    defaults = {"r": 2, "lora_alpha": 16, "target_modules": Q_V, "task_type": None}
    return get_peft_model(base or encoder(), LoraConfig(**defaults | options))


def beside(weight: Tensor, **options) -> LoRALinear:
    """LoRA beside one frozen matrix, in the type of that matrix."""
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight = nn.Parameter(weight.clone())
    defaults = {"target_modules": ["0"], "task_type": None}
    return get_peft_model(nn.Sequential(linear), LoraConfig(**defaults | options)).to(weight.dtype).base_model[0]


def texts(batch: int = 4, length: int = 12) -> Tensor:
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(2))


def finetune(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float = 1e-2,
    ratio: float = 1.0,
    decay: float = 0.0,
) -> None:
    """Train what is trainable with AdamW, at a learning rate that falls to zero linearly."""
    optimizer = torch.optim.AdamW(parameter_groups(model, rate, ratio), weight_decay=decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def classification(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(texts()), torch.tensor([0, 1, 2, 3]))


def distance(layer: nn.Linear, target: Tensor) -> Callable[[], Tensor]:
    """||W - target||^2 / 2, a task with a known solution. W is read from the layer's outputs for the unit vectors."""
    return lambda: (layer(torch.eye(layer.in_features, dtype=target.dtype)).T - target).square().sum() / 2


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Record(TorchDispatchMode):
    """Every operation computed within the block, as (name, shapes of its inputs)."""

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


# Section 2: the goal


def test_a_task_has_few_parameters_of_its_own():
    """Equation 2: |Theta| << |Phi_0|, here for DistilBERT itself with r = 2."""
    with torch.device("meta"):
        model = adapted(DistilBertForSequenceClassification(DistilBertConfig(num_labels=4)))
    theta, everything = model.get_nb_trainable_parameters()
    assert theta == 36_864
    assert everything - theta == 66_956_548
    assert theta / (everything - theta) < 0.0006


def test_only_theta_has_gradients_and_changes():
    """Equation 2 maximises over Theta. Phi_0 stays the same bit for bit, even under weight decay, which needs no gradient."""
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finetune(model, classification(model), steps=3, decay=0.1)
    for name, parameter in model.named_parameters():
        in_theta = name.endswith(("lora_A.weight", "lora_B.weight"))
        assert (parameter.grad is not None) == in_theta, name
        assert torch.equal(parameter, before[name]) != in_theta, name


# Section 4.1: the update


def test_the_output_is_W0_x_plus_BA_x():
    """Equation 3: h = W0 x + dW x = W0 x + B A x, with dW x scaled by alpha / r."""
    W0, x = random(7, 5), random(3, 5)  # d_out = 7, d_in = 5: a transposed matrix does not fit
    layer = perturb(beside(W0, r=2, lora_alpha=6))
    A, B = layer.lora_A.weight, layer.lora_B.weight
    assert (A.shape, B.shape) == ((2, 5), (7, 2))
    for row, h in zip(x, layer(x), strict=True):
        torch.testing.assert_close(h, W0 @ row + 6 / 2 * (B @ (A @ row)))


def test_B_and_A_are_not_transposed_in_a_square_layer():
    """Equation 3 again. In a square layer a mistake fits: A^T B^T x has the shape of B A x, and also starts at zero."""
    x = random(3, 6)
    layer = perturb(beside(random(6, 6), r=2, lora_alpha=2))
    torch.testing.assert_close(layer(x) - x @ layer.weight.T, x @ layer.delta_weight().T)
    assert not torch.allclose(layer.delta_weight(), layer.delta_weight().T, atol=0.1)


def test_training_starts_at_the_pretrained_model():
    """Section 4.1: A random, B zero, so dW is zero. The logits are equal bit for bit."""
    base = encoder()
    expected = logits(base)
    model = adapted(base)
    for layer in layers(model).values():
        assert layer.lora_A.weight.any()
        assert not layer.delta_weight().any()
    assert torch.equal(logits(model), expected)


def test_the_first_gradient_of_A_is_zero_because_B_is():
    """Each matrix gets its gradient through the other: dL/dA = s B^T G and dL/dB = s G A^T, with G = dL/dW."""
    model = adapted()
    classification(model)().backward()
    for layer in layers(model).values():
        assert not layer.lora_A.weight.grad.any()
        assert layer.lora_B.weight.grad.any()


def test_the_first_step_is_full_finetuning_seen_through_A():
    """From that start, with G = dL/dW: dL/dA = 0 and dL/dB = s G A^T, so one step of SGD makes dW = -lr s^2 G A^T A.

    Full fine-tuning makes dW = -lr G. LoRA projects its rows onto the row space of A, and multiplies the rate by s^2.
    """
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
        for parameter in trainable(layer).values():
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
    """How much the first step lowers the loss, to first order: -<G, dW>, where G = dL/dW."""
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


def test_the_first_step_of_adam_gains_the_same_for_any_r():
    """Section 4.1: the scaling "helps to reduce the need to retune hyperparameters when we vary r".

    Under Adam this is exact in expectation: the r rows of A add the same gain each, and alpha / r divides the sum by r.
    (SGD's step has a second factor of alpha / r: see rsLoRA below.)
    """
    gains = [first_order_gain(r, adam=True) for r in (4, 16, 64)]
    assert min(gains) > 0
    assert max(gains) == pytest.approx(min(gains), rel=0.05)


def test_tuning_alpha_is_tuning_the_learning_rate():
    """Section 4.1: under Adam "tuning alpha is roughly the same as tuning the learning rate if we scale the initialization
    appropriately".

    Apart from Adam's epsilon this is exact: c^2 alpha, with A / c at the start, trains like a learning rate of c lr.
    """
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


def test_as_r_grows_LoRA_approaches_full_finetuning():
    """Section 4.1. LoRA finds the best rank-r part of the change that a task needs (Eckart and Young 1936).

    The singular values after the r-th are missing. With r = d none are, as in full fine-tuning.
    """
    W0, (U, _, V) = random(6, 6), torch.linalg.svd(random(6, 6, seed=4))
    change = U @ torch.diag(singular := torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=W0.dtype)) @ V
    for r in (1, 2, 4, 6):
        torch.manual_seed(r)
        layer = beside(W0, r=r, lora_alpha=r)
        finetune(layer, missing := distance(layer, W0 + change), steps=300, rate=0.1)
        assert missing().item() == pytest.approx(singular[r:].square().sum().item() / 2, abs=0.01)


def test_with_full_rank_any_finetuned_model_is_reachable():
    """Section 4.1: with r as high as the ranks of the weights "we roughly recover the expressiveness of full fine-tuning".

    All matrices and biases can be matched. "Roughly", because embeddings and the scales of LayerNorm stay as they were.
    """
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
def test_merged_it_runs_the_same_operations_as_the_base(options, batch, length):
    """Section 4.1: no latency "by construction". The same operations in the same order, on the same shapes.

    Section 3 compares: adapter layers add depth, which hurts at batch size 1, and prefixes use up part of the length.
    """
    base, input_ids = encoder(), texts(batch, length)
    pretrained, expected = logits(base), computed(base, input_ids).operations
    model = perturb(adapted(base, **options))
    answers = logits(model)
    assert len(computed(model, input_ids).operations) > len(expected)
    for merge in (model.merge_adapter, model.merge_and_unload):
        merged = merge() or model
        assert computed(merged, input_ids).operations == expected
        torch.testing.assert_close(logits(merged), answers, atol=1e-4, rtol=1e-4)  # "inference as usual"
    assert (answers - pretrained).abs().max() > 0.1


def test_unmerged_each_matrix_costs_two_thin_products():
    """Section 4.1: merging saves A x and B (A x), products with r as one of their dimensions."""
    base = encoder()
    expected = Counter(computed(base, texts()).products())
    more = Counter(computed(adapted(base, r=3), texts()).products()) - expected
    assert more.total() == 2 * len(Q_V) * LAYERS
    assert all(3 in (*left, *right) for left, right in more)


def test_one_base_switches_between_tasks_exactly(tmp_path):
    """Sections 1 and 4.1: to switch tasks, subtract B A from the weights and add another B' A'.

    The paper's subtraction restores W0 up to rounding. Here W0 is restored bit for bit.
    """
    expected = {}
    for seed, task in enumerate(["one", "other"]):
        model = perturb(adapted(), seed)
        model.save_pretrained(tmp_path / task)
        expected[task] = logits(model)
    assert (expected["one"] - expected["other"]).abs().max() > 0.1

    model = PeftModel.from_pretrained(encoder(), tmp_path / "one")
    W0 = [layer.weight.clone() for layer in layers(model).values()]
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected["one"], atol=1e-4, rtol=1e-4)
    for layer, original in zip(layers(model).values(), W0, strict=True):
        torch.testing.assert_close(layer.weight - layer.delta_weight(), original, atol=1e-6, rtol=1e-5)

    model.load_adapter(tmp_path / "other")
    assert all(torch.equal(layer.weight, original) for layer, original in zip(layers(model).values(), W0, strict=True))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected["other"], atol=1e-4, rtol=1e-4)


# Section 4.2: practical benefits


def test_everything_but_attention_is_frozen():
    """Section 4.2: the MLP is frozen. Here LayerNorms, biases and embeddings are too."""
    model = adapted(target_modules=ATTENTION)
    for name in trainable(model):
        assert ".attention." in name
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))
    assert len(trainable(model)) == 2 * len(ATTENTION) * LAYERS


def test_the_optimizer_keeps_state_for_theta_only():
    """Section 4.2: "we do not need to store the optimizer states for the frozen parameters".

    Adam keeps two numbers for each parameter that is trained.
    """

    def numbers_kept(model: nn.Module) -> int:
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1.0), weight_decay=0.0)
        classification(model)().backward()
        optimizer.step()
        return sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in optimizer.state.values())

    base = encoder()
    everything = sum(parameter.numel() for parameter in base.parameters())
    assert numbers_kept(base) == 2 * everything
    model = adapted(base)
    assert numbers_kept(model) == 2 * model.get_nb_trainable_parameters()[0] < 2 * everything / 40


def test_no_gradient_is_computed_for_frozen_weights():
    """Section 4.2: this makes training faster. Backward through a linear layer takes two products; the one for W0 is gone."""

    def going_back(model: nn.Module) -> int:
        loss = classification(model)()
        with Record() as record:
            loss.backward()
        return record.multiplications()

    assert going_back(adapted()) < 0.6 * going_back(encoder())


def test_the_checkpoint_holds_theta_and_nothing_else(tmp_path):
    """Section 4.2: the checkpoint holds four bytes for each trained parameter, after a table of contents."""
    model = perturb(adapted())
    model.save_pretrained(tmp_path)
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    table = int.from_bytes(content[:8], "little")
    assert len(content) - 8 - table == 4 * model.get_nb_trainable_parameters()[0]
    tensors = safetensors.torch.load(content).values()
    assert sorted(tensor.norm().item() for tensor in tensors) == sorted(p.norm().item() for p in trainable(model).values())


# Section 5.1: the number of parameters


@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("targets", [["q_lin"], Q_V, ATTENTION], ids=lambda targets: ", ".join(targets))
def test_theta_has_2_L_d_r_parameters(r, targets):
    """Section 5.1: |Theta| = 2 x L x d_model x r, where L counts the adapted matrices."""
    theta, _ = adapted(r=r, target_modules=targets).get_nb_trainable_parameters()
    assert theta == 2 * (len(targets) * LAYERS) * D * r


# Section 7: what the update learns


def test_low_and_high_rank_share_the_first_direction():
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


def test_dW_amplifies_what_W0_does_not_emphasise():
    """Section 7.3: the amplification is ||dW|| / ||U^T W0 V||, where U and V are the singular directions of dW."""
    U, _, V = torch.linalg.svd(random(8, 8))
    W0 = U @ torch.diag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1], dtype=U.dtype)) @ V
    task = W0 + 20 * torch.outer(U[:, 7], V[7])  # the task needs the weakest direction of W0
    torch.manual_seed(0)
    layer = beside(W0, r=1, lora_alpha=1)
    finetune(layer, distance(layer, task), steps=300, rate=0.1)
    dW = layer.delta_weight().detach()
    left, _, right = torch.linalg.svd(dW)
    amplification = dW.norm() / (left[:, :1].T @ W0 @ right[:1].T).norm()
    assert amplification.item() == pytest.approx(20, rel=0.01)


# rsLoRA: Kalajdzievski 2023, arXiv:2312.03732


def test_rslora_is_stable_where_alpha_over_r_vanishes():
    """Theorem 3.2 there: with alpha / sqrt(r), outputs and input gradients neither vanish nor explode as r grows.

    Measured by the gain of SGD's first step. As seen above, dW = -lr s^2 G A^T A, and A^T A grows in proportion to r. So s^2
    must fall as 1 / r; (alpha / r)^2 falls faster, and learning vanishes.
    """
    stable, vanishing = ([first_order_gain(r, adam=False, use_rslora=rs) for r in (4, 16, 64)] for rs in (True, False))
    assert stable == pytest.approx([stable[0]] * 3, rel=0.05)
    assert vanishing == pytest.approx([vanishing[0], vanishing[0] / 4, vanishing[0] / 16], rel=0.05)


# DoRA: Liu et al. 2024, arXiv:2402.09353


def test_dora_starts_as_W0_with_its_lengths_as_m():
    """Equation 5 there: W' = m (W0 + B A) / ||W0 + B A||, with m = ||W0|| and B = 0 at the start."""
    W0 = random(7, 5)
    layer = beside(W0, r=2, use_dora=True)
    torch.testing.assert_close(layer.lora_magnitude_vector, W0.norm(dim=1))
    torch.testing.assert_close(layer.merged_weight(), W0)


def test_in_dora_only_m_changes_the_lengths():
    """Section 4.1 there: A and B turn the rows, m scales them. LoRA changes direction and length together."""
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


def test_in_loraplus_B_moves_lambda_times_as_far_as_A():
    """lr_B = lambda lr_A. Adam's first step moves each number by its learning rate, so B moves lambda times as far as A.

    (B does not start at zero here, because then A would have no gradient yet.)
    """
    model = adapted(init_lora_weights=False)
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    finetune(model, classification(model), steps=1, rate=1e-3, ratio=16.0)
    moved = {name: (parameter - before[name]).abs().median().item() for name, parameter in trainable(model).items()}
    for name, distance_moved in moved.items():
        assert distance_moved == pytest.approx(16e-3 if "lora_B" in name else 1e-3, rel=0.01), name
