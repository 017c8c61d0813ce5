"""What this machine can do, and what a run takes from it."""

import os
import sys

import torch
from torch import nn

from common.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of that name, or the best there is; under torchrun each process has a GPU of its own.

    Raises UserError if this machine has none.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name):
        raise UserError(f"--device is {name}, and PyTorch finds none on this machine: leave it out, or use cpu")
    if name == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: start as many processes with --nproc-per-node")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
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
    """Make every frozen matrix `dtype`: they need neither gradient nor float32. Vectors (biases, LayerNorms) stay float32.

    They are copied, for as they come they are part of the checkpoint's file, which would stay in memory for their sake.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and dtype != torch.float32:
            parameter.data = parameter.data.to(dtype) if parameter.dim() > 1 else parameter.data.clone()


def peak_memory_mb(device: torch.device) -> float | None:
    """The most memory that the process (on a GPU: its tensors there) has held so far, in MB; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        with open("/proc/self/status") as status:  # Linux
            return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # macOS, and other systems with no /proc
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child begins with its parent's, so that /proc comes first
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, others KiB
