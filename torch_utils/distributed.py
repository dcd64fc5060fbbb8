"""Processes and devices: everything works the same with one process and with many."""

import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch


def select_device(device: str = "auto") -> torch.device:
    """Resolve ``auto`` (CUDA where present, else CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    ValueError
        If CUDA is asked for and not there, or the name is no device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device={device} is no device; use auto, cpu, cuda or cuda:N.") from None
    if result.type == "mps":
        raise ValueError(f"--device={device} lacks float64, in which samples are drawn and compared; use --device=cpu.")
    if result.type not in ("cpu", "cuda"):
        raise ValueError(f"--device={device} is not supported; use auto, cpu, cuda or cuda:N.")
    if result.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device={device} asks for CUDA, which is not available here; use --device=cpu.")
        index = result.index if result.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"Process {index} on this machine has no GPU of its own: {torch.cuda.device_count()} found."
            )
        result = torch.device("cuda", index)
    return result


def init(device: str = "auto") -> torch.device:
    """Join the process group that torchrun announces (nccl on CUDA, gloo on CPU); return this rank's device.

    Without torchrun, or with one process, no group is made. float32 stays float32: TF32 is off.
    """
    result = select_device(device)
    if result.type == "cuda":
        torch.cuda.set_device(result)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        backend = "nccl" if result.type == "cuda" else "gloo"
        store, rank, world_size = next(torch.distributed.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = torch.distributed.PrefixStore(_agree_on_attempt(store, rank, world_size), store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return result


def _agree_on_attempt(store: torch.distributed.Store, rank: int, world_size: int) -> str:
    """A name that the processes started together share, and no earlier ones had.

    torchrun keeps one store over its restarts. What killed processes have left there, such as
    their addresses, would make the next ones fail or wait for ever; and the count of restarts differs between nodes.
    So rank 0 makes up a name and hands it to each rank that shows a token of its own, and whoever has it says so.
    """
    store = torch.distributed.PrefixStore("attempts", store)
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"token of {rank}", own)
        name = store.get(f"name for {own}").decode()
        store.set(f"{name} has {rank}", "")
        return name
    missing, answered = set(range(1, world_size)), set()
    while missing:
        missing = {r for r in missing if not store.check([f"{own} has {r}"])}
        for r in missing:
            if store.check([f"token of {r}"]) and (token := store.get(f"token of {r}").decode()) not in answered:
                store.set(f"name for {token}", own)
                answered.add(token)
        time.sleep(0.01)
    return own


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def get_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def get_world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def print0(*args: Any, **kwargs: Any) -> None:
    """Print on rank 0 only."""
    if get_rank() == 0:
        print(*args, **kwargs, flush=True)


def broadcast(value: Any) -> Any:
    """Return rank 0's `value` (anything that pickles; it never leaves this job) on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks (anything that pickles, such as arrays), in rank order."""
    if get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts


def on_rank0(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return on every rank what `function` returns on rank 0, where alone it is called.

    Its OSError or ValueError is raised on every rank, too: none is left waiting for rank 0.
    """
    result = error = None
    if get_rank() == 0:
        try:
            result = function(*args, **kwargs)
        except (OSError, ValueError) as err:
            error = err
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result
