"""Worker processes: a dead one is replaced, jobs are retried as asked, none is left behind."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.runs.status import RunState, RunStatus
from kd.sweep import worker_pool
from kd.sweep.worker_pool import Send


def act(number: int, tell: Send) -> RunStatus:
    """Jobs 10, 11, ... end differently; any other is done and says in which process."""
    tell("pid", os.getpid())
    if number == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 11:
        return RunStatus(RunState.FAILED, "boom")
    if number == 12:
        return RunStatus(RunState.DIVERGED, "nan")
    if number == 13:
        time.sleep(60)
    if number == 14:
        for _ in range(600):
            time.sleep(0.05)
            if tell("epoch", {}):
                return RunStatus(RunState.PRUNED)
    if number == 15:
        try:
            time.sleep(60)
        except KeyboardInterrupt:  # it had all but finished
            return RunStatus(RunState.DONE, "in time")
    return RunStatus(RunState.DONE, os.environ.get("SLOT", ""))


class Seen:
    """What a run of the pool said. Its first word is answered with Ctrl-C, if asked."""

    def __init__(self, stop: int | None = None, interrupt: bool = False) -> None:
        self.outcomes: dict[int, RunStatus] = {}
        self.pids: list[int] = []
        self.stop = stop
        self.interrupt = interrupt

    def ended(self, number: int, outcome: RunStatus) -> None:
        assert number not in self.outcomes, "a job ended twice"
        self.outcomes[number] = outcome

    def heard(self, number: int, message: tuple) -> bool:
        if message[0] == "pid":
            self.pids.append(message[1])
            if self.interrupt:  # soon, when the job sleeps
                threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        return number == self.stop


def each(numbers: list[int]) -> Callable:
    jobs = iter(numbers)
    return lambda: (n, n) if (n := next(jobs, None)) is not None else None


def run(numbers: list[int], slots: int = 1, stop: int | None = None, max_retries: int = 0) -> Seen:
    seen = Seen(stop)
    worker_pool.run(
        each(numbers),
        act,
        [{"SLOT": f"slot {i}"} for i in range(slots)],
        seen.ended,
        seen.heard,
        max_retries,
    )
    return seen


def gone(pids: list[int]) -> bool:
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            return False
    return True


@pytest.mark.slow
def test_a_worker_does_many_jobs_and_a_dead_one_is_replaced() -> None:
    seen = run([1, 2, 10, 3, 11, 12, 4])
    assert {n: o.state for n, o in seen.outcomes.items()} == {
        1: "done",
        2: "done",
        3: "done",
        4: "done",
        10: "killed",
        11: "failed",
        12: "diverged",
    }
    assert seen.outcomes[10].reason == "its process was killed by SIGKILL"
    assert len(set(seen.pids)) == 2, "start-up is paid once, and once more for the dead worker"
    assert gone(seen.pids)


def test_each_slot_has_its_environment_and_this_process_keeps_its_own() -> None:
    seen = run([1, 2, 3, 4, 5, 6], slots=2)
    assert {o.reason for o in seen.outcomes.values()} <= {"slot 0", "slot 1"}
    assert "SLOT" not in os.environ


@pytest.mark.parametrize("failures", [0, 2])
def test_retries_are_bounded_and_what_diverged_is_not_tried_again(failures: int) -> None:
    seen = run([10, 11, 12], max_retries=failures)
    assert len(seen.pids) == 2 * (1 + failures) + 1
    assert sorted(seen.outcomes) == [10, 11, 12]


def test_a_job_can_be_asked_to_stop() -> None:
    assert run([14, 1], stop=14).outcomes == {
        14: RunStatus(RunState.PRUNED),
        1: RunStatus(RunState.DONE, "slot 0"),
    }


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_starts_no_job_and_goes_on() -> None:
    seen = Seen(interrupt=True)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        worker_pool.run(each([13, 1, 2]), act, [{}], seen.ended, seen.heard)
    assert time.monotonic() - begun < 50  # it would sleep for 60
    assert seen.outcomes == {13: RunStatus(RunState.KILLED, "interrupted")}
    assert gone(seen.pids)


@pytest.mark.slow
def test_a_job_that_ends_while_its_worker_is_ended_is_done() -> None:
    seen = Seen(interrupt=True)
    with pytest.raises(KeyboardInterrupt):
        worker_pool.run(each([15, 1]), act, [{}], seen.ended, seen.heard)
    assert seen.outcomes == {15: RunStatus(RunState.DONE, "in time")}
