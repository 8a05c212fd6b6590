"""Worker processes that each run many jobs. A worker that dies is replaced; when the parent dies, none is left.

It knows nothing of what a job is: `work` is any picklable callable. Messages are tuples; a job speaks to the parent
through the `tell` it is given, and is asked through its answer to stop early.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from kd.core import streams

GRACE_SECONDS = 6.0  # seconds a worker has to leave in order before it is killed


class Outcome(NamedTuple):
    """How a job ended: done, failed, diverged, pruned or killed, and why."""

    state: str
    reason: str = ""


Send = Callable[..., bool]  # send a message to the parent; True: please stop
Work = Callable[[Any, Send], Outcome]  # do the job that this picklable thing describes


def run(
    source: Callable[[], tuple[int, Any] | None],
    work: Work,
    slots: Sequence[Mapping[str, str]],
    ended: Callable[[int, Outcome], None],
    heard: Callable[[int, tuple[Any, ...]], bool],
    max_failures: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Do `work(job, tell)` for each (number, job) of `source`, one worker a slot, and report each outcome once.

    **Arguments:** `source()` is asked when a slot is free; None: there is nothing to do for now, and nothing at all
    when no job is running. `slots`: what each worker's environment has beside this process's; `ended(number,
    outcome)`; `heard(number, message)`: what a job told, answered with whether it shall stop; `max_failures`: how
    often a job that failed or was killed is tried again (a diverged one would only diverge again); `tick()`: called at
    least once a second.
    On KeyboardInterrupt the workers are ended, their jobs are reported as killed, and the interrupt goes on.
    """
    again, tries = deque[tuple[int, Any]](), Counter[int]()
    workers = [_Worker(work, environment) for environment in slots]

    def finish(worker: _Worker, outcome: Outcome) -> None:
        assert worker.job is not None
        (number, _), worker.job = (job := worker.job), None
        if outcome.state in ("failed", "killed") and tries[number] < max_failures:
            tries[number] += 1
            again.append(job)
        else:
            ended(number, outcome)

    try:
        while True:
            for worker in workers:
                if worker.job is None and (job := again.popleft() if again else source()):
                    worker.submit(*job)
            if all(w.job is None for w in workers):
                break
            tick()
            wait([handle for w in workers for handle in w.handles()], timeout=1.0)
            for worker in workers:
                death = worker.exit_reason()  # asked before its last words are read
                for message in worker.messages():
                    if message[0] == "ended":
                        finish(worker, message[1])
                    elif worker.job is not None and heard(worker.job[0], message):
                        worker.request_stop()
                if death and worker.job is not None:
                    finish(worker, Outcome("killed", death))
    finally:
        _end(workers)
        for worker in workers:
            for message in worker.messages():
                if message[0] == "ended" and worker.job is not None:
                    ended(worker.job[0], message[1])
                    worker.job = None
            if worker.job is not None:
                ended(worker.job[0], Outcome("killed", "interrupted"))


def _end(workers: Sequence["_Worker"]) -> None:
    """Let idle workers go, end busy ones, and leave none behind, however impatient the user."""
    living = [w.process for w in workers if w.process is not None and w.process.is_alive()]
    for worker in workers:
        worker.shutdown()
    try:
        deadline = time.monotonic() + GRACE_SECONDS
        for process in living:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in living:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # its group: also what it started
            process.kill()
            process.join()


class _Worker:
    """One slot: a process, started when it is first needed and again when it died."""

    def __init__(self, work: Work, environment: Mapping[str, str]):
        self.work, self.environment = work, environment
        self.process: Any = None
        self.connection: Connection | None = None
        self.job: tuple[int, Any] | None = None

    def submit(self, number: int, job: Any) -> None:
        for _ in range(2):
            if self.process is None or not self.process.is_alive():
                self._start()
            assert self.connection is not None
            with contextlib.suppress(OSError):  # it died this very moment: start another
                self.connection.send(("job", job))
                break
        self.job = number, job

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_worker_main, args=(theirs, self.work), name="kd-worker"
        )
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        handler = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # it inherits this: a Ctrl-C is the parent's to answer
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def handles(self) -> list[Any]:
        return [] if self.process is None else [self.connection, self.process.sentinel]

    def messages(self) -> Iterable[tuple[Any, ...]]:
        with contextlib.suppress(EOFError, OSError):
            while self.connection is not None and self.connection.poll():
                yield self.connection.recv()

    def exit_reason(self) -> str:
        """Why the process is gone, or an empty text."""
        if self.process is None or self.process.is_alive():
            return ""
        self.process.join()
        code, self.process = self.process.exitcode, None
        return (
            f"its process died of {signal.Signals(-code).name}"
            if code < 0
            else f"its process left with code {code}"
        )

    def request_stop(self) -> None:
        with contextlib.suppress(OSError):
            assert self.connection is not None
            self.connection.send(("stop", None))

    def shutdown(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(OSError, ProcessLookupError):
            if self.job is None and self.connection is not None:
                self.connection.send(("job", None))
            else:
                os.kill(self.process.pid, signal.SIGTERM)


def _worker_main(connection: Connection, work: Work) -> None:
    """A worker's life: in a process group of its own, deaf to Ctrl-C (the parent decides), until told to go."""
    os.setsid()
    streams.protect()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _raise_interrupt)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop, lock = threading.Event(), threading.Lock()

    def tell(*message: Any) -> bool:
        with lock, contextlib.suppress(OSError):
            connection.send(message)
        return stop.is_set()

    threading.Thread(target=_listen, args=(connection, jobs, stop), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        while (job := jobs.get()) is not None:
            stop.clear()
            tell("ended", work(job, tell))


def _raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _listen(connection: Connection, jobs: "queue.SimpleQueue[Any]", stop: threading.Event) -> None:
    """Hear the parent. Silence that cannot be broken means that it died: leave in order, or else be killed."""
    try:
        while True:
            kind, job = connection.recv()
            stop.set() if kind == "stop" else jobs.put(job)
            if kind == "job" and job is None:
                return
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.killpg(0, signal.SIGKILL)
