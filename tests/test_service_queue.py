"""The job queue: turns, bounds, cancelling, crashes."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import Cancelled, ImageError
from diptych.webui.jobs import Job, JobQueue, QueueFull


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    queue = JobQueue(max_waiting=8, max_waiting_per_client=4)
    yield queue
    queue.close()


class Gate:
    """Work that waits until it is let go on, or is cancelled."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> Iterator[str]:
        self.entered.set()
        while not self.opened.wait(0.005):
            if job.skip_token.is_set():
                raise Cancelled("stopped")
        yield "let through"


def held(queue: JobQueue) -> Gate:
    gate = Gate()
    queue.submit("somebody", "hold", gate)
    assert gate.entered.wait(5)
    return gate


def test_a_job_gives_what_its_work_yields(queue):
    job = queue.submit("a", "count", lambda job: iter([1, 2, 3]))
    assert job.wait(5) and job.state == "done" and job.results == [1, 2, 3]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=20))
def test_clients_take_turns_whatever_the_order_of_arrival(clients):
    queue, order = JobQueue(100, 100), []
    try:
        gate = held(queue)
        jobs = [queue.submit(client, "", lambda job: order.append(job.client) or ()) for client in clients]
        expected = [job.client for job in queue.jobs()[1:]]
        gate.opened.set()
        assert all(job.wait(5) for job in jobs)
    finally:
        queue.close()
    assert order == expected and sorted(order) == sorted(clients)
    for turn in range(len(clients)):  # nobody is served an n+1st time while another still waits for the nth
        so_far = {client: order[:turn].count(client) for client in set(clients)}
        waiting = [client for client in so_far if so_far[client] < clients.count(client)]
        if waiting:
            assert so_far[order[turn]] == min(so_far[client] for client in waiting)


def test_jobs_of_one_client_keep_their_order(queue):
    gate, order = held(queue), []
    jobs = [queue.submit("a", str(i), lambda job: order.append(job.title) or ()) for i in range(4)]
    gate.opened.set()
    assert all(job.wait(5) for job in jobs) and order == ["0", "1", "2", "3"]


def test_a_client_over_its_share_is_refused_with_the_limit_and_others_are_not(queue):
    held(queue)
    for _ in range(4):
        queue.submit("a", "", lambda job: ())
    with pytest.raises(QueueFull, match="at most 4"):
        queue.submit("a", "", lambda job: ())
    queue.submit("b", "", lambda job: ())


def test_a_full_queue_refuses_everybody_with_the_limit(queue):
    held(queue)
    for i in range(8):
        queue.submit(f"client {i}", "", lambda job: ())
    with pytest.raises(QueueFull, match="at most 8"):
        queue.submit("another", "", lambda job: ())


def test_cancelling_a_waiting_job_frees_its_place_at_once_and_touches_no_other(queue):
    gate = held(queue)
    first, second = (queue.submit("a", "", lambda job: iter("x")) for _ in range(2))
    queue.cancel(first)
    assert first.wait(0) and first.state == "cancelled" and queue.find(first.id) is None
    gate.opened.set()
    assert second.wait(5) and second.state == "done"


def test_cancelling_the_running_job_keeps_what_it_had_made_and_touches_no_other(queue):
    gate = Gate()

    def work(job: Job) -> Iterator[str]:
        yield "first"
        yield from gate(job)

    running, other = queue.submit("a", "", work), queue.submit("b", "", lambda job: iter("x"))
    assert gate.entered.wait(5)
    queue.cancel(running)
    assert running.wait(5) and running.state == "cancelled" and running.results == ["first"]
    assert other.wait(5) and other.state == "done"


def test_a_client_that_goes_away_leaves_no_job_behind(queue):
    gate = Gate()
    jobs = [queue.submit("gone", "", gate)] + [queue.submit("gone", "", lambda job: ()) for _ in range(3)]
    assert gate.entered.wait(5)
    stays = queue.submit("stays", "", lambda job: ())
    queue.cancel_client("gone")
    assert all(job.wait(5) and job.state == "cancelled" for job in jobs)
    assert stays.wait(5) and stays.state == "done"


@pytest.mark.parametrize("crash", [RuntimeError("bang"), MemoryError(), SystemExit(3), ImageError("no picture")])
def test_a_job_that_crashes_fails_alone(queue, crash):
    def work(job: Job) -> Iterator[str]:
        yield "before"
        raise crash

    failing, next_one = queue.submit("a", "", work), queue.submit("a", "", lambda job: iter("x"))
    assert failing.wait(5) and failing.state == "failed" and failing.error is crash and failing.results == ["before"]
    assert next_one.wait(5) and next_one.state == "done"


def test_progress_and_time_left_can_be_read_while_it_runs(queue):
    gate = Gate()

    def work(job: Job) -> Iterator[str]:
        job.progress(1, 4)
        yield from gate(job)

    job = queue.submit("a", "", work)
    assert gate.entered.wait(5)
    time.sleep(0.02)
    assert job.fraction == 0.25 and job.seconds_left is not None and job.seconds_left > 0
    gate.opened.set()
    assert job.wait(5)


def test_an_id_is_found_while_in_line_and_cannot_be_taken_twice(queue):
    gate = held(queue)
    job = queue.submit("a", "", lambda job: (), job_id="mine")
    assert queue.find("mine") is job and queue.position(job) == 1
    with pytest.raises(ValueError, match="mine"):
        queue.submit("b", "", lambda job: (), job_id="mine")
    gate.opened.set()
    assert job.wait(5)
    assert queue.submit("b", "", lambda job: (), job_id="mine").wait(5)


def test_waiting_for_a_job_holds_no_thread(queue):
    async def many() -> list[str]:
        gate = held(queue)
        jobs = [queue.submit(f"client {i}", "", lambda job: iter("x")) for i in range(8)]
        waits = [asyncio.create_task(job.wait_async()) for job in jobs]
        await asyncio.sleep(0.01)
        before = threading.active_count()
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(*waits), 5)
        assert threading.active_count() <= before
        return [job.state for job in jobs]

    assert asyncio.run(many()) == ["done"] * 8


def test_a_closed_queue_stops_everything_and_takes_nothing_new(queue):
    gate = held(queue)
    waiting = queue.submit("a", "", lambda job: ())
    queue.close(5)
    assert waiting.state == "cancelled" and not gate.opened.is_set()
    with pytest.raises(QueueFull, match="shutting down"):
        queue.submit("a", "", lambda job: ())


def test_a_finished_job_is_not_kept_by_the_queue(queue):
    job = queue.submit("a", "", lambda job: iter("x"))
    assert job.wait(5)
    deadline = time.monotonic() + 5
    while queue.jobs() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert queue.jobs() == [] and queue.find(job.id) is None
