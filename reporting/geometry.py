"""Section 7 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685) for one adapted layer at a time.

W0 (d_out, d_in) is the pretrained weight, A (r, d_in) and B (d_out, r) are the adapter, and dW is the update of W0. Everything
is computed in float64. The singular values of BA come from the thin factors, not from the (d_out, d_in) product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora import LoRALinear
from lora.variants import DoRALinear


@dataclass(frozen=True)
class Geometry:
    relative_size: float  # |dW| / |W0|
    singular_values: Tensor  # (r,) of (alpha / r) BA, the largest first
    effective_rank: float  # of BA, from 1 to r
    amplification: float  # section 7.3
    A: Tensor  # (r, d_in)


@torch.no_grad()
def geometry(layer: LoRALinear) -> Geometry:
    """The geometry of one layer. Effective rank and amplification are NaN if dW is zero."""
    W0 = (layer.weight if layer.W0 is None else layer.W0).double()
    A, B = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    U, values, Vh = thin_svd(layer.scaling * B, A)
    dW = layer.delta_weight().double()
    if isinstance(layer, DoRALinear):  # DoRA also scales the rows of W0, so dW has a higher rank than r
        dW = layer.merged_weight().double() - W0
        U, _, Vh = torch.linalg.svd(dW, full_matrices=False)
        U, Vh = U[:, : len(values)], Vh[: len(values)]
    return Geometry((dW.norm() / W0.norm()).item(), values, effective_rank(values), amplification(dW, W0, U, Vh), A)


def thin_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), the singular values (r,) and Vh (r, d_in) of BA.

    With B = Qb Rb and A^T = Qa Ra, BA = Qb (Rb Ra^T) Qa^T. The matrix in brackets is at most r x r.
    """
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, values, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Qb @ U, values, Vh @ Qa.T


def effective_rank(values: Tensor) -> float:
    """exp(-sum p_i ln p_i) with p_i = value_i / sum of values: Roy & Vetterli 2007, "The effective rank", definition 1.

    1 if only one singular value is not zero, r if r are equal and the rest zero, NaN if all are zero.
    """
    return torch.special.entr(values / values.sum()).sum().exp().item()


def amplification(dW: Tensor, W0: Tensor, U: Tensor, Vh: Tensor) -> float:
    """|dW| / |U^T W0 V| (Frobenius) of section 7.3, with the top singular directions U (d_out, r) and Vh (r, d_in) of dW."""
    return (dW.norm() / (U.T @ W0 @ Vh.T).norm()).item() if dW.any() else float("nan")


def subspace_similarity(A: Tensor, other: Tensor) -> Tensor:
    """phi (r, r') of A (r, d_in) and another run's A' (r', d_in): equation 4, for every i and j at once.

    Entry [i - 1, j - 1] is |U_i^T U'_j|^2 / min(i, j), where U_i holds the first i right singular vectors of A: 1 if one span
    contains the other, 0 if they are orthogonal, and max(i, j) / d_in on average if they are random.
    """
    U, other_U = (torch.linalg.svd(matrix.double(), full_matrices=False)[2] for matrix in (A, other))
    overlap = (U @ other_U.T).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, len(U) + 1), torch.arange(1, len(other_U) + 1)
    return overlap / torch.minimum(i[:, None], j[None, :])
