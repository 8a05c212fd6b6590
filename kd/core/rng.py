"""Named random streams, one per use, so that drawing from one never changes another."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def named_seed(seed: int, name: str) -> int:
    """Return the seed of the stream `name`: a 63-bit integer, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Seed torch from the stream `name` inside the block; afterwards restore all its generators."""
    state = random_state()
    try:
        torch.manual_seed(named_seed(seed, name))
        yield
    finally:
        restore_random_state(state)


def random_state() -> tuple[Any, Any, Any]:
    """Return the states of torch's generators: of the CPU, of all GPUs and of MPS."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return (
        torch.get_rng_state(),
        cuda,
        torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    )


def restore_random_state(state: tuple[Any, Any, Any]) -> None:
    """Restore the states returned by `random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    if state[2] is not None:
        torch.mps.set_rng_state(state[2])
