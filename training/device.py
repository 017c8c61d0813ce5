"""The device, the arithmetic, and how much memory was used."""

import contextlib
import functools
import os
import platform
import re
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from training.fast_cpu import Int8Weight

FLOATS = torch.bfloat16, torch.float32  # the one that needs less memory comes first
DTYPES = *FLOATS, torch.int8


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
        number, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= count:
            raise UserError(f"LOCAL_RANK is {number}, but this machine has {count} GPUs. Set --nproc-per-node to that or less")
        torch.cuda.set_device(int(number))
        return torch.device("cuda", int(number))
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, candidates: tuple[torch.dtype, ...] = FLOATS) -> tuple[torch.dtype, str]:
    """The arithmetic with that name, and the reason in a few words. "auto" is the fastest of the candidates.

    On a GPU that is bfloat16, if the GPU multiplies it natively. A CPU can have bfloat16 instructions and be slower with them
    (seen on an Intel Xeon without AMX), so there the products are timed. Raises UserError if int8 is typed and not possible.
    """
    can_int8 = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if name == "int8" and not can_int8:
        raise UserError(f"--dtype int8 runs on x86 processors, and this is {device.type} on {platform.machine()}. Use auto")
    if name != "auto":
        return getattr(torch, name), "as typed"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU multiplies it natively"
    has_bfloat16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    possible = {torch.float32: True, torch.bfloat16: has_bfloat16, torch.int8: can_int8}
    timed = tuple(dtype for dtype in candidates if possible[dtype])
    if timed == (torch.float32,):
        return torch.float32, f"this {device.type} does not multiply bfloat16 natively"
    seconds = time_products(timed)
    listed = ", ".join(f"{dtype_name(dtype)} {1000 * taken:.1f} ms" for dtype, taken in seconds.items())
    # within 5 % of the fastest the first one wins
    fastest = next(dtype for dtype, taken in seconds.items() if taken <= 1.05 * min(seconds.values()))
    return fastest, f"measured on this processor: {listed}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache  # a process measures once
def time_products(dtypes: tuple[torch.dtype, ...], repeats: int = 5) -> dict[torch.dtype, float]:
    """Seconds for a feed-forward layer of DistilBERT with 512 tokens, forward and back to its input. 0.2 s in all.

    The types take turns and the fastest repeat counts, so that another program on the machine changes little.
    """
    layers = {dtype: feed_forward_products(dtype) for dtype in dtypes}
    seconds = dict.fromkeys(dtypes, float("inf"))
    for _ in range(repeats):
        for dtype, products in layers.items():
            start = time.perf_counter()
            products()
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds


def feed_forward_products(dtype: torch.dtype) -> Callable[[], object]:
    type_of_x = torch.float32 if dtype == torch.int8 else dtype
    x, gradient, weight = (torch.ones(shape, dtype=type_of_x) for shape in [(512, 768), (512, 3072), (3072, 768)])
    if dtype == torch.int8:
        packed = Int8Weight(weight)
        return lambda: (packed.product(x), packed.transposed.product(gradient))
    return lambda: (F.linear(x, weight), gradient @ weight)


def cast_frozen_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert every frozen matrix to `dtype`; it needs neither a gradient nor float32. Biases and LayerNorms stay float32.

    In bfloat16 all frozen tensors are copied, so that the memory-mapped checkpoint can be freed.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and dtype == torch.bfloat16:
            parameter.data = parameter.data.to(dtype) if parameter.dim() > 1 else parameter.data.clone()


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory of this process (on a GPU: of its tensors) in MB; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:  # Linux
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM"))
    with contextlib.suppress(ImportError):
        import resource  # macOS and others; on Linux it includes the parent's peak, so /proc comes first

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, others KiB
    return None
