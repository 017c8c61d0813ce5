"""Several processes that train one model: `torchrun` starts them, and each computes its share of every batch.

Every process holds the whole model and all texts. It computes the gradient of the summed loss of its share, divided by the
batch's size; the sum over the processes is the gradient of the batch. So all that travels is the gradients of what is trained:
2.5 MB a step for DistilBERT with r = 2 and its head, where full fine-tuning sends 268 MB.
"""

import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError

LOADING = timedelta(minutes=30)  # one may have to download what the others have
WORKING = timedelta(seconds=50)  # how long a frozen or unplugged process is waited for; that one died is noticed at once


@contextmanager
def answer_expected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"another process died or does not answer ({error}): its own message says why") from error


class Distributed:
    """This process, number `rank` of `world`. Without `torchrun` it is the only one, and nothing below has anything to do."""

    def __init__(self) -> None:
        self.rank, self.world_size = (int(os.environ.get(name, default)) for name, default in [("RANK", 0), ("WORLD_SIZE", 1)])
        self.group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the others, over nccl between GPUs and gloo between CPUs."""
        self.device = device
        if self.world_size == 1:
            return
        if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":  # set by torchrun, however many cores there are
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))))
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end
        with answer_expected():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LOADING)

    def require_same(self, mine: dict[str, Any]) -> None:
        """Wait until all have loaded, and see to it that they have loaded the same. From here on nobody is waited for long.

        Raises UserError if an entry of `mine` differs between processes, by the entry's name.
        """
        if self.world_size == 1:
            return
        checksums = torch.tensor([zlib.crc32(repr(value).encode()) for value in mine.values()], device=self.device)
        everybodys = [torch.empty_like(checksums) for _ in range(self.world_size)]
        with answer_expected():
            dist.all_gather(everybodys, checksums)
            self.group = dist.new_group(timeout=WORKING)
        for rank, theirs in enumerate(everybodys):
            for what, equal in zip(mine, theirs == everybodys[0], strict=True):
                if not equal:
                    raise UserError(f"{what} differs between processes 0 and {rank}: start all of them alike")

    def shard(self, items: Any) -> Any:
        """Every world-th of a list or an array, so that neighbours, which are of similar length, are dealt out evenly."""
        return items[self.rank :: self.world_size]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, in place. Raises UserError if one of them does not answer."""
        if self.world_size > 1:
            with answer_expected():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor, signal: int) -> Tensor:
        """Make every gradient, and `loss`, the sum over the processes, in one message; no gradient counts as zero.

        Returns () the signal that reached any of them (0: none), so that all stop after the same step.
        """
        if self.world_size == 1:
            return torch.tensor(signal)
        signals = torch.zeros(self.world_size, device=self.device)
        signals[self.rank] = signal
        parts = [loss, signals]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parts.append(parameter.grad)
        message = self.all_reduce(torch.cat([part.flatten() for part in parts]))
        for part, summed in zip(parts, message.split([part.numel() for part in parts]), strict=True):
            part.copy_(summed.view_as(part))
        return signals.max()

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()
