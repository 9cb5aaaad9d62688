"""Checks how ranks meet: this process's place among them, the port, and keys in the store."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvlm_train.doctor.finding import Findings, error, ok

if TYPE_CHECKING:
    from torch.distributed import Store


@dataclass(frozen=True)
class World:
    """Says which rank this process is, by the variables of torchrun or the launch script."""

    rank: int
    size: int
    address: str
    port: int

    @classmethod
    def here(cls) -> World:
        """Reads the environment. Without these variables the world has one rank."""
        environment = os.environ
        return cls(
            int(environment.get("RANK", environment.get("SLURM_PROCID", "0"))),
            int(environment.get("WORLD_SIZE", environment.get("SLURM_NTASKS", "1"))),
            environment.get("MASTER_ADDR", "127.0.0.1"),
            int(environment.get("MASTER_PORT", "29500")),
        )


def check_port(world: World) -> Findings:
    """Checks that MASTER_ADDR resolves, and that its port is free unless torchrun listens on it."""
    try:
        found = socket.getaddrinfo(world.address, world.port, type=socket.SOCK_STREAM)
    except OSError as problem:
        yield error(
            "rendezvous",
            f"MASTER_ADDR={world.address} does not resolve ({problem.strerror})",
            "use the first host's name as the other nodes know it, or its address",
        )
        return
    where = f"MASTER_ADDR={world.address} ({found[0][4][0]}) MASTER_PORT={world.port}"
    if world.rank or agent_listens():
        yield ok("rendezvous", where)
        return
    with socket.socket(found[0][0], socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", world.port))
        except OSError as problem:
            yield error(
                "rendezvous",
                f"{where}: the port cannot be opened ({problem.strerror})",
                "set MASTER_PORT to a free one; `ss -ltnp` shows who has it",
            )
            return
    yield ok("rendezvous", f"{where}, free")


def agent_listens() -> bool:
    """Returns whether torchrun holds the port and serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def silent_ranks(store: Store, key: str, ranks: Sequence[int], seconds: float) -> list[int]:
    """Returns the ranks that have not written `key/RANK` after `seconds`."""
    missing = absent(store, [f"{key}/{rank}" for rank in ranks], seconds)
    return [int(name.rpartition("/")[2]) for name in missing]


def absent(store: Store, keys: list[str], seconds: float) -> list[str]:
    """Returns the keys that are not in the store after `seconds`."""
    end = time.monotonic() + seconds
    while keys:
        keys = [key for key in keys if not store.check([key])]
        if not keys or time.monotonic() > end:
            break
        time.sleep(0.05)
    return keys


def first_line(problem: BaseException) -> str:
    """Returns the first line of an error's message, without torch's trace."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]
