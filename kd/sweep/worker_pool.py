"""Run many jobs in worker processes, replacing workers that die and leaving none behind.

The pool does not depend on what a job is: `work` is any picklable callable. Messages are tuples. A
job sends messages to the parent process with the `send` function that it receives, which returns
True when the job should stop early. If the parent process dies, its workers exit too.

On Linux, workers are forked from a server process that has imported the training code once (see
`kd.sweep.fork_server`). Elsewhere each worker is a new Python process.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from kd.core import streams
from kd.runs.status import RunState, RunStatus

GRACE_SECONDS = 6.0  # seconds that a worker has to exit in order before it is killed

_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


Send = Callable[..., bool]  # send a message to the parent; True: the job should stop
Work = Callable[[Any, Send], RunStatus]  # run the job that the first argument (picklable) describes


def run(
    source: Callable[[], tuple[int, Any] | None],
    work: Work,
    slots: Sequence[Mapping[str, str]],
    on_end: Callable[[int, RunStatus], None],
    on_message: Callable[[int, tuple[Any, ...]], bool],
    max_retries: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run `work(job, send)` for each (number, job) of `source`, with one worker per slot.

    Args:
        source: Called whenever a slot is free. None means that there is no job at present; if no
            job is running either, it means that there are no more jobs.
        work: Runs one job in a worker process.
        slots: Environment variables of each worker, in addition to those of this process.
        on_end: Called as `on_end(number, outcome)`, exactly once for each job.
        on_message: Called as `on_message(number, message)` for each message of a job. Returns
            whether the job should stop.
        max_retries: How often to retry a job that failed or was killed. A diverged job is not
            retried, since it would diverge again.
        tick: Called at least once per second.

    Raises:
        KeyboardInterrupt: The process was interrupted. First the workers are stopped, and their
            jobs are reported as killed.
    """
    retry_queue = deque[tuple[int, Any]]()
    retries = Counter[int]()  # by job number
    workers = [_Worker(work, environment) for environment in slots]

    def finish(worker: _Worker, outcome: RunStatus) -> None:
        job = worker.job
        assert job is not None
        worker.job = None
        number = job[0]
        if outcome.state in (RunState.FAILED, RunState.KILLED) and retries[number] < max_retries:
            retries[number] += 1
            retry_queue.append(job)
        else:
            on_end(number, outcome)

    try:
        while True:
            for worker in workers:
                if worker.job is None and (
                    job := retry_queue.popleft() if retry_queue else source()
                ):
                    worker.submit(*job)
            if all(worker.job is None for worker in workers):
                break
            tick()
            handles = [handle for worker in workers for handle in worker.handles()]
            wait(handles, timeout=1.0)
            for worker in workers:
                exit_reason = worker.exit_reason()  # before its last messages are read
                for message in worker.messages():
                    if message[0] == "ended":
                        finish(worker, message[1])
                    elif worker.job is not None and on_message(worker.job[0], message):
                        worker.request_stop()
                if exit_reason and worker.job is not None:
                    finish(worker, RunStatus(RunState.KILLED, exit_reason))
    finally:
        _stop_workers(workers)
        for worker in workers:
            for message in worker.messages():
                if message[0] == "ended" and worker.job is not None:
                    on_end(worker.job[0], message[1])
                    worker.job = None
            if worker.job is not None:
                on_end(worker.job[0], RunStatus(RunState.KILLED, "interrupted"))


def _stop_workers(workers: Sequence["_Worker"]) -> None:
    """Shut down idle workers, terminate busy ones, and kill what remains even if interrupted."""
    processes = [w.process for w in workers if w.process is not None and w.process.is_alive()]
    for worker in workers:
        worker.shutdown()
    try:
        deadline = time.monotonic() + GRACE_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.kill()
            process.join()


class _Worker:
    """One slot: a process that is started when it is first needed, and again after it died."""

    def __init__(self, work: Work, environment: Mapping[str, str]):
        self.work = work
        self.environment = environment
        self.process: Any = None
        self.connection: Connection | None = None
        self.job: tuple[int, Any] | None = None

    def submit(self, number: int, job: Any) -> None:
        """Give the worker a job, starting its process if necessary."""
        for _ in range(2):
            if self.process is None or not self.process.is_alive():
                self._start()
            assert self.connection is not None
            with contextlib.suppress(OSError):  # it died at this moment: start another
                self.connection.send(("job", job))
                break
        self.job = number, job

    def _start(self) -> None:
        context = _context()
        self.connection, child_connection = context.Pipe()
        environment = {**os.environ, **self.environment}
        ignored = [number for number in _TERMINATING if signal.getsignal(number) == signal.SIG_IGN]
        self.process = context.Process(
            target=_worker_main,
            args=(child_connection, self.work, environment, ignored),
            name="kd-worker",
        )
        # A server that is started now loads its libraries with these variables
        previous = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        # The worker inherits this: the parent alone handles Ctrl-C.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
            for name, value in previous.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value
        child_connection.close()

    def handles(self) -> list[Any]:
        """Return what becomes ready when the worker sends a message or exits."""
        return [] if self.process is None else [self.connection, self.process.sentinel]

    def messages(self) -> Iterable[tuple[Any, ...]]:
        """Yield the messages that have arrived, without waiting for more."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection is not None and self.connection.poll():
                yield self.connection.recv()

    def exit_reason(self) -> str:
        """Return why the process has ended, once; empty while it is alive or not started."""
        if self.process is None or self.process.is_alive():
            return ""
        self.process.join()
        code = self.process.exitcode
        self.process = None
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process exited with code {code}"

    def request_stop(self) -> None:
        """Request the job to stop: from now on its `send` returns True."""
        with contextlib.suppress(OSError):
            assert self.connection is not None
            self.connection.send(("stop", None))

    def shutdown(self) -> None:
        """Let an idle process exit, and terminate a busy one."""
        if self.process is None:
            return
        with contextlib.suppress(OSError, ProcessLookupError):
            if self.job is None and self.connection is not None:
                self.connection.send(("job", None))
            else:
                os.kill(self.process.pid, signal.SIGTERM)


def _context() -> Any:
    """Return how to start processes: see the module's docstring."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd.sweep.fork_server", "kd.cli"])
    return context


def _worker_main(
    connection: Connection,
    work: Work,
    environment: Mapping[str, str],
    ignored: Sequence[signal.Signals],
) -> None:
    """Run jobs until shutdown, in a process group of its own.

    Args:
        connection: To the parent process.
        work: Runs one job.
        environment: The environment variables of this process.
        ignored: Terminating signals that the parent ignores, as nohup has it do with SIGHUP.
            SIGINT is always ignored, because the parent handles it.
    """
    os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("kd-worker")
    os.environ.clear()
    os.environ.update(environment)
    streams.protect()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in _TERMINATING:
        signal.signal(number, signal.SIG_IGN if number in ignored else _raise_interrupt)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()
    lock = threading.Lock()

    def send(*message: Any) -> bool:
        with lock, contextlib.suppress(OSError):
            connection.send(message)
        return stop.is_set()

    threading.Thread(target=_listen, args=(connection, jobs, stop), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        while (job := jobs.get()) is not None:
            stop.clear()
            send("ended", work(job, send))


def _raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _listen(connection: Connection, jobs: "queue.SimpleQueue[Any]", stop: threading.Event) -> None:
    """Receive jobs and stop requests from the parent until shutdown.

    A broken connection means that the parent died: interrupt this process so that it exits in
    order, and kill its process group if it has not done so after the grace period.
    """
    try:
        while True:
            kind, job = connection.recv()
            if kind == "stop":
                stop.set()
            else:
                jobs.put(job)
            if kind == "job" and job is None:
                return
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.killpg(0, signal.SIGKILL)
