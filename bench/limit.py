"""How fast the machine multiplies: the limit for every implementation."""

import functools
import time
import timeit
from collections.abc import Callable
from typing import Any

SLOW = 2  # a type that takes so many times as long as float32 is not tried: an emulated bfloat16 trains for minutes


class Limit:
    """The rate of the linear layers' products alone, in each arithmetic. No implementation on this machine can be faster."""

    def __init__(self, config: dict[str, Any]):
        import torch

        d, h = config["dim"], config["hidden_dim"]
        block, self.layers = 4 * d * d + 2 * d * h, config["n_layers"]
        self.forward = (self.layers - 1) * block + 2 * d * d  # the last layer needs only keys and values of all tokens
        self.backward = self.forward - 3 * d * d  # the first needs no gradient of its input
        self.flops, self.seconds = 0, dict.fromkeys(("float32", "bfloat16", "int8"), 0.0)
        self.weights: dict[str, list[tuple[Any, Callable]]] = {name: [] for name in self.seconds}
        for shape in [(d, d), (h, d), (d, h)]:
            weight = torch.randn(shape)
            for name in self.seconds:
                for matrix in (weight, weight.t().contiguous()):  # forward, backward
                    self.weights[name].append((matrix.shape, product(name, matrix)))
        self.measure(tokens=64)
        self.slowdown = self.seconds["bfloat16"] / self.seconds["float32"]
        names = ("float32", "bfloat16", "int8") if self.slowdown < SLOW else ("float32", "int8")
        self.flops, self.seconds = 0, dict.fromkeys(names, 0.0)

    def measure(self, tokens: int = 1024) -> None:
        """Time every product: the best of three, when the threads of the last side are asleep."""
        import torch

        time.sleep(0.02)
        for name in self.seconds:
            for (_, size), multiply in self.weights[name]:
                x = torch.randn(tokens, size)
                x = x.bfloat16() if name == "bfloat16" else x
                self.seconds[name] += min(timeit.repeat(functools.partial(multiply, x), number=1, repeat=4)[1:])
        self.flops += sum(2 * tokens * shape.numel() for shape, _ in self.weights["float32"])

    def rates(self) -> dict[str, float]:
        """FLOP/s."""
        return {name: self.flops / taken for name, taken in self.seconds.items()}

    def sentence(self) -> str:
        listed = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.rates().items())
        slow = "" if "bfloat16" in self.seconds else f" bfloat16 takes {self.slowdown:.0f} times as long as float32: not tried."
        return f"Bare products: {listed}. The limit is the fastest of them.{slow}"

    def shares(self, arithmetic: str, tokens: int, seconds: float, training: bool) -> dict[str, float]:
        """What part of `seconds` bare products need for these tokens (without padding): in that arithmetic, in the fastest."""
        needed, rates = 2 * tokens * (self.forward + training * self.backward), self.rates()
        return {
            "of its products": needed / seconds / rates[arithmetic],
            "of the limit": needed / seconds / max(rates.values()),
        }


def product(arithmetic: str, weight: Any) -> Callable[[Any], Any]:
    """The function from x to x W^T that is the fastest known with a weight that never changes."""
    import torch
    import torch.nn.functional as F

    if arithmetic == "int8":
        scales, zeros = weight.abs().amax(dim=1) / 127, torch.zeros(len(weight), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed)
    if arithmetic == "bfloat16" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, reordered, None, "none", [], "")
    weight = weight.to(getattr(torch, arithmetic))
    return lambda x: F.linear(x, weight)
