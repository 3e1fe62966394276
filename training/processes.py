"""The processes that train together: one by default, or as many as a launcher started.

accelerate launch | torchrun -> environment -> `join` -> Processes -> sums, wrapped modules, one main process

Each process holds the whole data set and takes an equal part of each batch. Accelerate reads what launchers
leave in the environment and sets up the process group, on several nodes too; what is done with the group is
PyTorch's own.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, distributed, nn

from training import batch_norm

if TYPE_CHECKING:
    from training.recipe import Training


@dataclass(frozen=True)
class Processes:
    """This process's device and its place among `count` processes."""

    device: torch.device
    number: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Say whether this is the one process that writes and speaks."""
        return self.number == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors, which are alike in shape, to each of them."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def each(self, number: int) -> list[int]:
        """Return what number each process has."""
        if self.count == 1:
            return [number]
        numbers = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        numbers[self.number] = number
        return [int(value) for value in self.sum(numbers).tolist()]

    def join_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes' tensors, in the order of the processes."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def own_rows(self, tensor: Tensor) -> Tensor:
        """Return this process's part of rows that `join_rows` joined."""
        return tensor.chunk(self.count)[self.number]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def normalising(self, model: nn.Module) -> nn.Module:
        """Return the model with batch statistics over the images of all processes.

        Raises:
            ValueError: it has layers of batch normalisation that cannot be replaced.
        """
        return model if self.count == 1 else batch_norm.synchronised(model, device=self.device)

    def agree(self, module: nn.Module) -> None:
        """Give each process the main one's buffers: batch statistics may be each process's own."""
        if self.count > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, src=0)

    def averaging(self, module: nn.Module) -> nn.Module:
        """Return the module with gradients averaged over the processes."""
        if self.count == 1:
            return module
        devices = None if self.device.type == "cpu" else [self.device]
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)


def join(device: str) -> Processes:
    """Join the processes that a launcher started; alone where there is none.

    Args:
        device: PyTorch's name of a device; of several processes, each takes its own of that type.

    Raises:
        ValueError: this machine has no such device.
    """
    alone = _device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(alone)
    from accelerate import PartialState  # noqa: PLC0415  # a second to import, and only these need it

    state = PartialState(cpu=alone.type == "cpu")
    if (state.num_processes, state.device.type) != (count, alone.type):
        msg = f"device: expected {count} processes on {alone.type}, got {state.num_processes} on {state.device.type}; "
        raise ValueError(msg + "start as many processes as there are devices, or name another device")
    return Processes(_device(str(state.device)), number=state.process_index, count=state.num_processes)


def leave() -> None:
    """Leave the process group, if this process is in one, when nothing is left to be done together."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process with an exit status, the last thing that it does; one of several ends without a teardown.

    DistributedDataParallel of PyTorch 2.15 keeps the group's threads alive past `destroy_process_group`, and a process
    that is torn down under gloo's now and then aborts. Its launcher then ends the others, whatever they are doing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def own_batch(settings: Training, processes: Processes) -> int:
    """Return how many images of a batch each process takes.

    Raises:
        ValueError: they cannot be shared equally.
    """
    size, rest = divmod(settings.batch_size, processes.count)
    if rest:
        msg = f"training.batch_size: expected a multiple of the {processes.count} processes, got {settings.batch_size}"
        raise ValueError(f"{msg}; change it, or start another number of processes")
    return size


def _device(name: str) -> torch.device:
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:  # of an unknown name, and of CUDA where there is none
        reason = str(error).split("\n", maxsplit=1)[0]
        msg = f"device: expected one that this machine has, got {name!r}: {reason}"
        raise ValueError(msg) from error
    return device
