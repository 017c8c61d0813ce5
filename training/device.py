"""The device, the arithmetic, and how much memory was used."""

import os
import sys

import torch
from torch import nn

from common.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device with that name; "auto" is the best available. Under torchrun each process gets a GPU of its own.

    Raises UserError if this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    if not available.get(name):
        raise UserError(f"--device is {name}, but PyTorch finds none on this machine. Leave the option out, or use cpu")
    if name == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs. Set --nproc-per-node to that number or less")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; "auto" is bfloat16 if the device multiplies it natively."""
    if name == "auto":
        native = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": torch.cpu._is_avx512_bf16_supported,
            "mps": lambda: False,
        }
        name = "bfloat16" if native[device.type]() else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def cast_frozen_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert every frozen matrix to `dtype`; it needs neither a gradient nor float32. Biases and LayerNorms stay float32.

    In bfloat16 all frozen tensors are copied, so that the memory-mapped checkpoint can be freed.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and dtype != torch.float32:
            parameter.data = parameter.data.to(dtype) if parameter.dim() > 1 else parameter.data.clone()


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory of this process (on a GPU: of its tensors) in MB; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        with open("/proc/self/status") as status:  # Linux
            return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # macOS and other systems without /proc
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux it includes the parent's peak, so /proc comes first
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, others KiB
