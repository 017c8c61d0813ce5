"""Several processes that train one model. `torchrun` starts them, and each one computes its shard of every batch.

Every process holds the whole model and all texts. It computes the gradient of its shard's summed loss, divided by the batch
size. The sum over the processes is the gradient of the batch. So only the gradients of the trained parameters are sent:
2.5 MB per step for DistilBERT with r = 2 and its head. Full fine-tuning sends 268 MB.
"""

import os
import re
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError

LOAD_TIMEOUT = timedelta(minutes=30)  # one process may have to download what the others have
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")  # of the environment
STEP_TIMEOUT = timedelta(seconds=50)  # for a process that hangs; one that died is noticed at once


@contextmanager
def explain_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"another process died or does not answer ({error}). Its own message says why") from error


def read_environment() -> tuple[int, int]:
    """RANK and WORLD_SIZE. Without torchrun's variables 0 and 1. Raises UserError if one is missing, or they contradict."""
    texts = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not texts.keys() - {"MASTER_ADDR", "MASTER_PORT"}:
        return 0, 1
    defaults = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": texts.get("WORLD_SIZE", "")}
    numbers = {name: int(text) for name, text in (defaults | texts).items() if re.fullmatch("[0-9]{1,9}", text)}
    rank, world_size, local_rank, local_world_size, port = (numbers.get(name, -1) for name in VARIABLES[:5])
    can_meet = world_size == 1 or (0 < port < 1 << 16 and bool(texts.get("MASTER_ADDR")))
    if 0 <= local_rank <= rank < world_size and local_rank < local_world_size <= world_size and can_meet:
        return rank, world_size
    said = ", ".join(f"{name} is {texts[name]!r}" if name in texts else f"{name} is missing" for name in VARIABLES)
    raise UserError(f"torchrun's variables do not fit together: {said}. Start with torchrun, or unset all of them")


class Distributed:
    """This process: number `rank` of `world_size`. Without `torchrun` it is the only one, and the methods do nothing.

    Raises UserError if the environment is not what torchrun makes it.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = read_environment()
        self.group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Connect to the other processes: over nccl between GPUs, over gloo between CPUs."""
        self.device = device
        if self.world_size == 1:
            return
        main = os.environ["MASTER_ADDR"]
        try:
            socket.getaddrinfo(main, None)
        except (OSError, UnicodeError) as error:  # torch would try again for LOAD_TIMEOUT
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"MASTER_ADDR is {main!r}, which cannot be found from here: {reason}. Check the name") from error
        if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun sets 1 on any number of cores
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))))
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        with explain_lost_process():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LOAD_TIMEOUT)

    def require_same(self, values: dict[str, Any]) -> None:
        """Wait until all processes have loaded, and check that they loaded the same. From here on STEP_TIMEOUT holds.

        Raises UserError, with the key, if one of `values` differs between processes.
        """
        if self.world_size == 1:
            return
        checksums = torch.tensor([zlib.crc32(repr(value).encode()) for value in values.values()], device=self.device)
        gathered = [torch.empty_like(checksums) for _ in range(self.world_size)]
        with explain_lost_process():
            dist.all_gather(gathered, checksums)
            self.group = dist.new_group(timeout=STEP_TIMEOUT)
        for rank, others in enumerate(gathered):
            for key, equal in zip(values, others == gathered[0], strict=True):
                if not equal:
                    raise UserError(f"{key} differs between processes 0 and {rank}. Start all of them with the same command")

    def from_main(self, number: int) -> int:
        """The main process's number, in all processes."""
        tensor = torch.tensor(number if self.is_main else 0, device=self.device)
        if self.world_size > 1:
            with explain_lost_process():
                dist.broadcast(tensor, src=0)
        return int(tensor)

    def shard(self, items: Any) -> Any:
        """This process's part of a list or array: every world_size-th item, which spreads long texts evenly."""
        return items[self.rank :: self.world_size]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the processes. Raises UserError if one of them does not answer."""
        if self.world_size > 1:
            with explain_lost_process():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_gradients(self, parameters: list[nn.Parameter], loss: Tensor, signal: int) -> int:
        """Replace `loss` and every gradient by their sums over the processes, in one message. A missing gradient is zero.

        Returns the signal that any of the processes received (0: none), so that all stop after the same step.
        """
        if self.world_size == 1:
            return signal
        signals = torch.zeros(self.world_size, device=self.device)
        signals[self.rank] = signal
        tensors = [loss, signals]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            tensors.append(parameter.grad)
        message = self.all_reduce(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, summed in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
        return int(signals.max())

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()
