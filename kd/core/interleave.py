"""Several runs in one process, a step of each in turn: what they need alike is made once.

A run that can be packed is a generator that yields None after each step and returns its result. Packed, it is the same
generator: its student, loss, optimizer, random state and files are its own, so a packed run ends with the bits that it
has alone. (Stacking the parameters under torch.func.vmap was measured: its grouped convolutions take 2.5 x the time of
the members' own on a CPU.)
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch

from kd.core.signals import SignalHandler

Steps = Generator[None, None, Any]


class RunCache:
    """What the runs of one process have in common: a memory of one thing of each kind, and the wish to stop."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Any, Any]] = {}
        self.signals = SignalHandler()

    def get_or_create(self, kind: str, key: Any, make: Callable[[], Any], *hanging: str) -> Any:
        """`make()`, or what it gave before if the last of this `kind` had this `key`. What is made replaces the last,
        and the kinds that start as one of `hanging` go with it: two of a kind may not fit into memory."""
        if kind not in self.entries or self.entries[kind][0] != key:
            self.entries.pop(kind, None)
            for start in hanging:
                self.forget(start)
            self.entries[kind] = key, make()
        return self.entries[kind][1]

    def forget(self, start: str) -> None:
        """Drop the kinds whose names start so."""
        self.entries = {
            kind: held for kind, held in self.entries.items() if not kind.startswith(start)
        }


def run_to_completion(steps: Steps) -> Any:
    """Run one to its end; its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def run_interleaved(
    members: Sequence[Steps],
    around: Callable[[int], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ended: Callable[[int, Any], None] = lambda *_: None,
) -> list[Any]:
    """Run all to their ends, a step of each in turn. **Returns:** for each its result, or the exception it raised.

    `around(i)` is entered before each step of member i and left after it; `ended(i, end)` is called when it is over.
    An interrupt reaches every member.
    """
    ends: list[Any] = [None] * len(members)
    states = {number: random_state() for number in range(len(members))}
    try:
        while states:
            for number in list(states):
                restore_random_state(states[number])
                try:
                    with around(number):
                        next(members[number])
                except StopIteration as end:
                    ends[number] = end.value
                except Exception as error:
                    ends[number] = error.with_traceback(None)  # which would keep its tensors
                else:
                    states[number] = random_state()
                    continue
                del states[number]
                ended(number, ends[number])
    except BaseException as interrupt:
        for number in states:
            with suppress(BaseException), around(number):
                members[number].throw(type(interrupt)(*interrupt.args))
        raise
    return ends


def random_state() -> tuple[Any, Any, Any]:
    """Of torch's generators: the CPU's, those of all GPUs, MPS's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return (
        torch.get_rng_state(),
        cuda,
        torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    )


def restore_random_state(state: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    if state[2] is not None:
        torch.mps.set_rng_state(state[2])
