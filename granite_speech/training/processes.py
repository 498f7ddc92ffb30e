"""Training in several processes, started by torchrun: joining, choosing devices, and stopping together if one fails."""

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from granite_speech.errors import GraniteSpeechError, InputError

__all__ = ["gather", "process_count", "process_group", "rank", "share_of", "shared_errors"]

# The others wait while process 0 validates and writes. torchrun ends them if it dies, so a long timeout does no harm.
_PATIENCE = timedelta(hours=12)
_GROUP_NUMBERS = itertools.count()
_SET_BY_TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def rank() -> int:
    """This process's number. Process 0 writes and reports; without a group, it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group(device: str | torch.device | None = None) -> Iterator[str | torch.device]:
    """Join the processes that torchrun started for the duration of the block. Yields this process's device.

    If the caller has initialized a group, that one is used and kept. Without torchrun there is one process and nothing to join.

    Args:
        device: "cuda", or None if CUDA is available, means the GPU with this process's LOCAL_RANK.

    Raises:
        InputError: more processes than GPUs, or two processes on the same GPU.
    """
    joins = dist.is_available() and not dist.is_initialized() and os.environ.keys() >= _SET_BY_TORCHRUN
    joins = joins and int(os.environ["WORLD_SIZE"]) > 1
    chosen = _own_device(device, shared=joins or process_count() > 1)
    on_gpu = str(chosen).startswith("cuda") and torch.cuda.is_available()
    if joins:
        _join("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        if on_gpu and process_count() > 1:
            torch.cuda.set_device(chosen)
            _check_devices(gather((socket.gethostname(), str(chosen))))
        yield chosen
        if joins:
            dist.barrier()  # a process that exits early breaks the others' connections
    finally:
        if joins:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    store, number, processes = next(dist.rendezvous("env://", timeout=_PATIENCE))
    store.set_timeout(_PATIENCE)
    # All groups use torchrun's store. Under the same keys, a process could read the others' addresses in the previous group.
    store = dist.PrefixStore(f"granite_speech/{next(_GROUP_NUMBERS)}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=_PATIENCE)


def _own_device(device: str | torch.device | None, *, shared: bool) -> str | torch.device:
    chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if not shared or str(chosen) != "cuda" or not torch.cuda.is_available():
        return chosen
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(
            got=f"process {number} of this machine, which has {gpus} GPUs",
            expected="one GPU per process",
            remedy=f"Start {gpus} processes (torchrun --nproc-per-node {gpus}), or pass device='cpu'",
        )
    return f"cuda:{number}"


def _check_devices(places: list[tuple[str, str]]) -> None:
    if len(set(places)) < len(places):
        raise InputError(
            got=f"{len(places)} processes on {', '.join(sorted({device for _, device in places}))}",
            expected="a separate GPU for each process",
            remedy="Pass device='cuda' so that each process gets its own, or start fewer",
        )


def share_of(accumulate: int) -> int:
    """Number of a step's batches that each process computes.

    Raises:
        InputError: the batches cannot be divided evenly.
    """
    count = process_count()
    if accumulate % count:
        raise InputError(
            got=f"accumulate = {accumulate} for {count} processes",
            expected="a multiple of the number of processes, which divide each step's batches",
            remedy=f"Set accumulate to {count} or a multiple of it, or start fewer processes",
        )
    return accumulate // count


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def shared_errors() -> Iterator[None]:
    """If the block raises in one process, raise in all of them, so that none waits for a process that has stopped.

    Every process must enter the block.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if process_count() == 1:
            raise
        error = caught
    # Errors of other libraries may not survive pickling, but their text does.
    sent = error if error is None or isinstance(error, GraniteSpeechError) else RuntimeError(f"process {rank()} failed: {error!r}")
    first = next((one for one in gather(sent) if one is not None), None)
    if first is not None:
        raise first if error is None else error
