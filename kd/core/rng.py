"""One named stream of randomness for each random part, so that drawing from one never shifts another."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def named_seed(seed: int, name: str) -> int:
    """The seed of the stream `name` under `seed`: a 63-bit integer, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Inside, torch's own generator follows the stream `name`; outside, it is as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed(seed, name))
        yield
