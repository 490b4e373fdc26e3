"""The job queue: the one place that runs work, for the page and the service alike.

Clients take turns: whoever's last turn is longest ago comes next, so many jobs of one client do not hold up another's
first. It is bounded, in all and for each client. A job that fails, fails alone. The queue knows nothing of pictures: a
job is a function that yields results one by one, and what it yielded before it was cancelled is kept.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any, Literal
from uuid import uuid4

from diptych.errors import Cancelled, DiptychError

log = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Work = Callable[["Job"], Iterable[Any]]


class QueueFull(DiptychError):
    """No place is free in the queue; the message says which limit was met."""


class _Skip:
    """The cancel token of one piece of work: set when that piece is to be skipped or the whole job is cancelled."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def is_set(self) -> bool:
        return self._job.skipping.is_set() or self._job.cancelling.is_set()


class Job:
    """One piece of work of one client. Made by `JobQueue.submit`; its attributes may be read from any thread."""

    def __init__(self, client: str, title: str, work: Work, job_id: str) -> None:
        self.id = job_id
        self.client = client
        self.title = title
        self.state: State = "waiting"
        self.results: list[Any] = []
        self.error: BaseException | None = None
        self.done = 0  # progress: this many of `total` units
        self.total = 0
        self.note = ""  # what is being done, in words
        self.preview: Any = None  # the picture as it is so far
        self.created = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self.cancelling = threading.Event()  # the cancel token: is_set()
        self.skipping = threading.Event()
        self.skip_token = _Skip(self)
        self._work = work
        self._finished = threading.Event()
        self._watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._lock = threading.Lock()

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to the job."""
        return self._finished.is_set()

    @property
    def fraction(self) -> float:
        """How much is done, 0..1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the time it took so far; None before the first step is done."""
        if self.seconds is None or not self.fraction:
            return None
        return self.seconds * (1 / self.fraction - 1)

    @property
    def seconds(self) -> float | None:
        """How long it has run, or ran in all; None before it started."""
        if self.started is None:
            return None
        return (self.ended or time.monotonic()) - self.started

    def progress(self, done: int, total: int) -> None:
        """The progress callback for the work."""
        self.done, self.total = done, total

    def cancel(self) -> None:
        """Asks the job to stop: at once if it waits (through the queue), else within one step or tile."""
        self.cancelling.set()

    def skip(self) -> None:
        """Asks the job to leave the picture at hand and go on with the next."""
        self.skipping.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until the job has finished; False if `timeout` seconds were not enough."""
        return self._finished.wait(timeout)

    async def wait_async(self) -> None:
        """Returns when the job has finished; costs no thread."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        with self._lock:
            if self.finished:
                return
            self._watchers.append((loop, event))
        await event.wait()

    def _run(self) -> State:
        self.started = time.monotonic()
        try:
            for result in self._work(self):
                self.results.append(result)
                if self.cancelling.is_set():
                    return "cancelled"
            return "done"
        except Cancelled:
            return "cancelled"
        except BaseException as error:  # whatever it was, the others' jobs go on
            if not isinstance(error, (DiptychError, ValueError, OSError)):
                log.exception("job %s (%s) failed", self.id, self.title)
            self.error = error
            return "failed"

    def _finish(self, state: State) -> None:
        self.state = state
        self.ended = time.monotonic()
        self.preview = None
        self._work = _nothing  # frees what the work holds: pictures sent in
        with self._lock:
            self._finished.set()
            watchers, self._watchers = self._watchers, []
        for loop, event in watchers:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that loop is closed: nobody waits there any more
                pass


def _nothing(job: Job) -> Iterable[Any]:
    return ()


class JobQueue:
    """Runs jobs one at a time on a thread of its own."""

    def __init__(self, max_waiting: int = 100, max_waiting_per_client: int = 10) -> None:
        self.max_waiting = max_waiting
        self.max_waiting_per_client = max_waiting_per_client
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # clients in the order of their turns
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="diptych-jobs", daemon=True)
        self._thread.start()

    def submit(self, client: str, title: str, work: Work, job_id: str | None = None) -> Job:
        """Puts a job in line. `work(job)` yields the results; `job_id` must be new among those in line.

        Raises QueueFull, and ValueError for an id that is in use.
        """
        job = Job(client, title, work, job_id or uuid4().hex)
        with self._changed:
            if self._closed:
                raise QueueFull("the server is shutting down: send the request again later")
            if self.find(job.id) is not None:
                raise ValueError(f"a job with the id {job.id!r} is already in line: choose another id")
            if sum(map(len, self._waiting.values())) >= self.max_waiting:
                raise QueueFull(f"the queue is full: at most {self.max_waiting} jobs wait; try again in a while")
            line = self._waiting.setdefault(client, deque())
            if len(line) >= self.max_waiting_per_client:
                raise QueueFull(
                    f"you have {len(line)} jobs waiting, and at most {self.max_waiting_per_client} may wait: "
                    "try again when one is done"
                )
            line.append(job)
            self._changed.notify()
        return job

    def find(self, job_id: str) -> Job | None:
        """The job with this id, if it waits or runs."""
        return next((job for job in self.jobs() if job.id == job_id), None)

    def jobs(self, client: str | None = None) -> list[Job]:
        """The running job, then the waiting ones in the order of their turns; only those of `client` if given."""
        with self._changed:
            lines = [list(line) for line in self._waiting.values()]
            jobs = [self._running] if self._running else []
        for turn in range(max(map(len, lines), default=0)):
            jobs += [line[turn] for line in lines if turn < len(line)]
        return [job for job in jobs if client is None or job.client == client]

    def position(self, job: Job) -> int:
        """How many jobs come before this one; 0 when it runs or is over."""
        jobs = self.jobs()
        return jobs.index(job) if job in jobs else 0

    def cancel(self, job: Job) -> None:
        """Stops this job and no other; one that waits leaves the line at once."""
        job.cancel()
        with self._changed:
            line = self._waiting.get(job.client)
            if line is None or job not in line:
                return
            line.remove(job)
            if not line:
                del self._waiting[job.client]
        job._finish("cancelled")

    def cancel_client(self, client: str) -> None:
        """Stops everything of a client that has gone."""
        for job in self.jobs(client):
            self.cancel(job)

    def close(self, timeout: float = 30) -> None:
        """Stops all jobs, takes no new ones, and waits for the one that runs to stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for job in self.jobs():
            self.cancel(job)
        self._thread.join(timeout)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                client, line = next(iter(self._waiting.items()))
                job = self._running = line.popleft()
                job.state = "running"
                del self._waiting[client]
                if line:  # to the end: the others have their turn first
                    self._waiting[client] = line
            state = job._run()
            with self._changed:
                self._running = None
            job._finish(state)
            del job  # holds nothing while it waits for the next
