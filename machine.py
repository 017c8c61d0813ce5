"""What this machine can do, and what a run takes from it."""

import sys

import torch
from torch import nn

from errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of that name, or the best there is. Raises UserError if this machine has none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name):
        raise UserError(f"--device is {name}, and PyTorch finds none on this machine: leave it out, or use cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, unless a type was asked for."""
    if name == "auto":
        native = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": torch.cpu._is_avx512_bf16_supported,
            "mps": lambda: False,
        }
        name = "bfloat16" if native[device.type]() else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def cast_frozen_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every frozen matrix `dtype`: they need neither gradient nor float32. Vectors (biases, LayerNorms) stay float32."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory that the process (on a GPU: its tensors there) has held so far, in MB; None where nobody counts."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)  # macOS counts bytes, Linux KiB
