"""Several processes that train one model. torchrun starts them; here they join, choose devices, and end together if one of them fails."""

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

# The others wait while the first process validates and writes. torchrun ends them if it dies, so a long wait does no harm.
_PATIENCE = timedelta(hours=12)
_GROUPS = itertools.count()  # all processes count the same
_SET_BY_TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def rank() -> int:
    """This process's number; 0 is the one that writes and reports, and the only one without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group(device: str | torch.device | None = None) -> Iterator[str | torch.device]:
    """Join the processes that torchrun started, for as long as the block runs; yields this process's own device.

    A group that the caller has initialised is used and left as it is. Without torchrun there is one process, and nothing to join.

    Args:
        device: "cuda" and, on a machine with CUDA, None mean the GPU of this process's number on its machine (LOCAL_RANK).

    Raises:
        InputError: more processes than GPUs, or two processes with the same GPU.
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
            dist.barrier()  # a process that leaves first would close the connection while others still use it
    finally:
        if joins:
            dist.destroy_process_group()


def _join(backend: str) -> None:
    # torchrun's store keeps the addresses of a group that has gone, and a second group would connect to those: each needs keys of its own.
    store, number, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
    store = dist.PrefixStore(f"granite_speech/{next(_GROUPS)}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_PATIENCE)


def _own_device(device: str | torch.device | None, *, shared: bool) -> str | torch.device:
    chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if not shared or str(chosen) != "cuda" or not torch.cuda.is_available():
        return chosen
    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(
            got=f"process {number} of this machine, which has {gpus} GPUs",
            expected="one GPU for each process",
            remedy=f"Start {gpus} processes (torchrun --nproc-per-node {gpus}), or pass device='cpu'",
        )
    return f"cuda:{number}"


def _check_devices(places: list[tuple[str, str]]) -> None:
    if len(set(places)) < len(places):
        raise InputError(
            got=f"{len(places)} processes on {', '.join(sorted({device for _, device in places}))}",
            expected="a GPU of its own for each process",
            remedy="Pass device='cuda' and let each process choose, or start fewer",
        )


def share_of(accumulate: int) -> int:
    """How many of a step's batches each process computes.

    Raises:
        InputError: they cannot be shared out evenly.
    """
    count = process_count()
    if accumulate % count:
        raise InputError(
            got=f"accumulate = {accumulate} for {count} processes",
            expected="a multiple of the number of processes, which share each step's batches",
            remedy=f"Set accumulate to {count} or a multiple of it, or start fewer processes",
        )
    return accumulate // count


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their numbers."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def shared_errors() -> Iterator[None]:
    """If the block fails in one process, it fails in all of them: none is left waiting for one that has gone.

    Every process must enter the block.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if process_count() == 1:
            raise
        error = caught
    # An error of another library may not survive pickling; its text does.
    sent = error if error is None or isinstance(error, GraniteSpeechError) else RuntimeError(f"process {rank()} failed: {error!r}")
    first = next((one for one in gather(sent) if one is not None), None)
    if first is not None:
        raise first if error is None else error
