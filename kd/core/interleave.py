"""Run several jobs in one process, one step of each in turn, sharing what they have in common.

A run that can be interleaved is a generator that yields None after each step and returns its
result. It has its own student, loss, optimizer, random state and files, so its result is
bit-identical to that of a separate run. (Stacking the parameters under torch.func.vmap was
measured: on a CPU its grouped convolutions take 2.5 times as long as separate convolutions.)
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from kd.core.rng import random_state, restore_random_state
from kd.core.signals import SignalHandler

Steps = Generator[None, None, Any]


class RunCache:
    """What the runs of one process share: a cache with one entry per kind, and the signal handler.

    Attributes:
        entries: (key, value) of each kind.
        signals: The handler of requests to stop.
    """

    def __init__(self) -> None:
        self.entries: dict[str, tuple[Any, Any]] = {}
        self.signals = SignalHandler()

    def get_or_create(self, kind: str, key: Any, make: Callable[[], Any], *dependents: str) -> Any:
        """Return the cached value of this kind if it has this key, else create and cache it.

        The old value is dropped before `make()` is called, because two of a kind may not fit into
        memory.

        Args:
            kind: Name of the entry.
            key: What the value depends on.
            make: Creates the value.
            dependents: Prefixes of the kinds that are dropped along with the old value.
        """
        if kind not in self.entries or self.entries[kind][0] != key:
            self.entries.pop(kind, None)
            for prefix in dependents:
                self.forget(prefix)
            self.entries[kind] = key, make()
        return self.entries[kind][1]

    def forget(self, prefix: str) -> None:
        """Drop all kinds whose names start with `prefix`."""
        self.entries = {
            kind: entry for kind, entry in self.entries.items() if not kind.startswith(prefix)
        }


def run_to_completion(steps: Steps) -> Any:
    """Run all steps of one run and return its result."""
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
    """Run all members to completion, one step of each in turn.

    An interrupt is raised in every member that is still running.

    Args:
        members: The runs.
        around: `around(i)` is entered before each step of member i and left after it.
        ended: `ended(i, outcome)` is called when member i has ended.

    Returns:
        The outcome of each member: its result, or the exception it raised.
    """
    outcomes: list[Any] = [None] * len(members)
    states = {number: random_state() for number in range(len(members))}
    try:
        while states:
            for number in list(states):
                restore_random_state(states[number])
                try:
                    with around(number):
                        next(members[number])
                except StopIteration as end:
                    outcomes[number] = end.value
                except Exception as error:
                    # the traceback would keep the member's tensors in memory
                    outcomes[number] = error.with_traceback(None)
                else:
                    states[number] = random_state()
                    continue
                del states[number]
                ended(number, outcomes[number])
    except BaseException as interrupt:
        for number in states:
            with suppress(BaseException), around(number):
                restore_random_state(states[number])
                members[number].throw(type(interrupt)(*interrupt.args))
        raise
    return outcomes
