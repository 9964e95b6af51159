"""Requests that share evaluations: each is what it is alone; faults of one, or of the engine, stay where they are."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sd_runtime import AsyncPipeline, Pipeline, Request, Result, Served, Step
from sd_runtime.bench.processes import peak_megabytes
from sd_runtime.errors import (
    CancelledError,
    DeadlineError,
    EngineError,
    NumericalError,
    OutOfMemoryError,
    OverloadedError,
    UsageError,
)
from sd_runtime.images.convert import to_pictures
from sd_runtime.sampling import describe
from served import Hook, Service, serving

SAMPLERS = [name.removesuffix("[_karras|_exponential]") for name, _ in describe()]


@pytest.fixture(scope="module")
def shared(demo_bundle: Path) -> Iterator[Service]:
    """One service for tests that leave it as it was."""
    with serving(demo_bundle) as service:
        yield service


@pytest.fixture
def service(shared: Service) -> Iterator[Service]:
    shared.watched.rows.clear()
    shared.watched.timesteps.clear()
    shared.backend.calls.clear()
    yield shared
    shared.watched.hook = None


def until(event: threading.Event) -> Hook:
    """Hold the UNet until something happened."""

    def wait(sample: np.ndarray) -> None:
        event.wait(30)

    return wait


def draw_all(service: Service, requests: list[Request], **more: Any) -> list[Served | BaseException]:
    """All at once: the loop is held until every request is there."""
    held = threading.Event()
    service.watched.hook = until(held)

    async def draw() -> list[Served | BaseException]:
        waiting = [asyncio.ensure_future(service.pipe.generate(request, **more)) for request in requests]
        while service.prepared < len(set(requests)):
            await asyncio.sleep(0.01)
        held.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(draw())


def alone(service: Service, request: Request) -> Result:
    return service.scheduler.pipeline.start(request).result()


def served(outcome: Served | BaseException) -> Served:
    assert isinstance(outcome, Served), outcome
    return outcome


# ---- step sharing ----------------------------------------------------------------------------------------------------


def test_every_sampler_merged_with_others_at_other_steps_is_what_it_is_alone(service: Service) -> None:
    """Guided and not, two and more pictures, other seeds and numbers of steps: to the last bit on the CPU."""
    requests = [
        service.request(
            f"a star, number {number}",
            seed=number,
            scheduler=sampler,
            num_inference_steps=3 + number % 4,
            guidance_scale=(1.0, 2.5, 6.0)[number % 3],
            num_images_per_prompt=1 + (number % 5 == 0),
        )
        for number, sampler in enumerate(SAMPLERS)
    ]
    outcomes = [served(outcome) for outcome in draw_all(service, requests)]
    assert max(service.watched.rows) == 8 and sum(o.shared_steps for o in outcomes) > len(requests)
    assert any(len(set(timesteps)) > 2 for timesteps in service.watched.timesteps)
    for request, outcome in zip(requests, outcomes, strict=True):
        expected = alone(service, request)
        assert np.array_equal(outcome.result.latents, expected.latents), request.scheduler
        assert np.array_equal(outcome.result.samples, expected.samples), request.scheduler
        assert outcome.result.parameters == expected.parameters


def test_pictures_to_change_and_given_latents_share_too(service: Service, pipe: Pipeline) -> None:
    picture = pipe("a red heart", seed=3, num_inference_steps=2, height=64, width=64).images[0]
    changed = service.request(strength=0.6, num_inference_steps=6, seed=5)
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8), np.float32)

    async def draw() -> list[Served]:
        pipeline = service.pipe
        return await asyncio.gather(
            pipeline.generate(changed, image=picture),
            pipeline.generate(service.request(), latents=latents),
            pipeline.generate(service.request("a house")),
        )

    first, second, _ = asyncio.run(draw())
    pipeline = service.scheduler.pipeline
    assert np.array_equal(first.result.latents, pipeline.start(changed, image=picture).result().latents)
    assert np.array_equal(second.result.latents, pipeline.start(service.request(), latents=latents).result().latents)


def test_equal_requests_are_drawn_once_and_equal_prompts_encoded_once(service: Service) -> None:
    request = service.request("drawn twice", seed=99)
    outcomes = draw_all(service, [request, request, service.request("drawn twice", seed=100)])
    assert served(outcomes[0]).result is served(outcomes[1]).result
    assert not np.array_equal(served(outcomes[0]).result.latents, served(outcomes[2]).result.latents)
    assert service.backend.calls["text_encoder"] == 1
    assert service.backend.calls["vae_decoder"] == 2


def test_a_short_request_passes_a_long_one(service: Service) -> None:
    """First come, first served would end the long one first."""
    ended: list[str] = []

    async def draw(name: str, steps: int) -> None:
        await service.pipe.generate(service.request(name, num_inference_steps=steps, scheduler="ddim"))
        ended.append(name)

    async def both() -> None:
        long = asyncio.ensure_future(draw("long", 60))
        await asyncio.sleep(0.1)
        await asyncio.gather(long, draw("short", 2))

    asyncio.run(both())
    assert ended == ["short", "long"]


def test_a_stream_has_every_step_and_then_the_pictures(service: Service) -> None:
    async def read() -> list[Step | Served]:
        return [item async for item in service.pipe.stream(service.request(scheduler="ddim", num_inference_steps=5))]

    *steps, last = asyncio.run(read())
    assert isinstance(last, Served) and all(isinstance(step, Step) for step in steps)
    assert [step.index for step in steps if isinstance(step, Step)] == [0, 1, 2, 3, 4]
    assert last.times.total > 0 and last.times.alone > 0 and last.times.shared == 0 == last.shared_steps
    assert last.result.images[0].size == (64, 64)


def test_threads_may_submit(service: Service) -> None:
    requests, results = [service.request(seed=seed) for seed in range(6)], dict[int, Result]()

    def draw(seed: int) -> None:
        results[seed] = service.pipe.submit(requests[seed]).future.result(30).result

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in results.items():
        assert np.array_equal(result.latents, alone(service, requests[seed]).latents)


def test_load_warms_up(demo_bundle: Path) -> None:
    async def run() -> tuple[dict[int, float], bool, Served]:
        async with await AsyncPipeline.load(demo_bundle, device="cpu", threads=1) as pipeline:
            request = pipeline.request("a star", seed=1, num_inference_steps=2, height=64, width=64)
            return pipeline.curve.points, pipeline.status.ready, await pipeline.generate(request)

    points, ready, outcome = asyncio.run(run())
    assert ready and {1, 2, 4, 8} <= set(points) and outcome.result.images[0].size == (64, 64)


# ---- what must not hurt ----------------------------------------------------------------------------------------------


def test_fault_23_nan_in_one_request_is_that_requests_alone(service: Service) -> None:
    good = service.request("good", seed=7)
    bad = service.request("bad", seed=8, guidance_scale=100.0)

    async def draw() -> list[Served | BaseException]:
        latents = np.full((1, 4, 8, 8), 3e38, np.float32)
        tasks = service.pipe.generate(bad, latents=latents), service.pipe.generate(good)
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second = asyncio.run(draw())
    assert isinstance(first, NumericalError)
    assert np.array_equal(served(second).result.latents, alone(service, good).latents)


def test_fault_24_an_evaluation_that_hangs_fails_its_requests_in_bounded_time(demo_bundle: Path) -> None:
    with serving(demo_bundle, hang_after=0.2) as service:
        forever = threading.Event()
        service.watched.hook = until(forever)
        started = time.monotonic()
        ticket = service.scheduler.submit(service.request())
        with pytest.raises(EngineError, match="has not come back for"):
            ticket.future.result(30)
        assert time.monotonic() - started < 20
        assert not service.scheduler.status.ready and "has not come back" in service.scheduler.status.why
        with pytest.raises(EngineError, match=r"the service is broken: .*; start it anew"):
            service.scheduler.submit(service.request())
        forever.set()


def test_fault_25_an_engine_that_always_fails_is_given_up(demo_bundle: Path) -> None:
    with serving(demo_bundle) as service:

        def fail(sample: np.ndarray) -> None:
            raise EngineError("an illegal memory access was encountered")

        service.watched.hook = fail
        tickets = [service.scheduler.submit(service.request(seed=seed)) for seed in range(3)]
        for ticket in tickets:
            with pytest.raises(EngineError, match="illegal memory access"):
                ticket.future.result(30)
        assert not service.scheduler.status.ready


def test_fault_22_too_little_memory_for_several_shares_less(demo_bundle: Path) -> None:
    with serving(demo_bundle) as service:
        requests = [service.request(seed=seed, guidance_scale=1.0) for seed in range(4)]
        held = threading.Event()

        def small(sample: np.ndarray) -> None:
            held.wait(20)
            if len(sample) > 2:
                raise OutOfMemoryError("no memory for so many rows")

        service.watched.hook = small
        tickets = [service.scheduler.submit(request) for request in requests]
        held.set()
        results = [ticket.future.result(30).result for ticket in tickets]
        service.watched.hook = None
        for request, result in zip(requests, results, strict=True):
            assert np.array_equal(result.latents, alone(service, request).latents)


def test_fault_27_a_child_that_was_forked_is_refused(service: Service) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            service.scheduler.submit(service.request())
        except UsageError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as said:
        assert "load the pipeline after fork" in said.read()


def test_fault_28_a_deadline_that_passes_in_the_queue_costs_no_step(service: Service) -> None:
    held = threading.Event()
    service.watched.hook = until(held)
    first = service.scheduler.submit(service.request(seed=1))
    late = service.scheduler.submit(service.request("late", seed=2), deadline=0.05)
    time.sleep(0.1)
    held.set()
    with pytest.raises(DeadlineError, match="the deadline passed after 0 of"):
        late.future.result(30)
    first.future.result(30)
    assert set(service.watched.rows) == {2}
    assert len(service.watched.rows) == 4  # PNDM's three steps, one of them twice


def test_fault_29_a_cancelled_task_costs_at_most_one_more_step(service: Service) -> None:
    request = service.request(num_inference_steps=50, scheduler="ddim")

    async def leave() -> int:
        async with aclosing(service.pipe.stream(request)) as items:
            async for _ in items:
                break
        return len(service.watched.rows)

    done = asyncio.run(leave())
    deadline = time.monotonic() + 20
    while service.scheduler.status.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(service.watched.rows) <= done + 2 < 50
    task_count = service.scheduler.status
    assert (task_count.waiting, task_count.running) == (0, 0)


def test_one_of_two_who_asked_for_the_same_may_leave(service: Service) -> None:
    request = service.request(num_inference_steps=20, scheduler="ddim", seed=77)
    first, second = service.scheduler.submit(request), service.scheduler.submit(request)
    first.cancel()
    with pytest.raises(CancelledError, match="the request was cancelled"):
        first.future.result(30)
    assert second.future.result(30).result.images


def test_fault_31_a_full_queue_refuses_at_once(demo_bundle: Path) -> None:
    with serving(demo_bundle, requests=2) as service:
        held = threading.Event()
        service.watched.hook = until(held)
        taken = [service.scheduler.submit(service.request(seed=seed)) for seed in range(2)]
        with pytest.raises(
            OverloadedError, match=r"requests in the queue: got 2, accepted fewer than 2; try again"
        ) as e:
            service.scheduler.submit(service.request(seed=3))
        assert e.value.retry_after >= 1
        assert service.scheduler.submit(service.request(seed=1)) is not None  # the same as one that is there
        held.set()
        for ticket in taken:
            ticket.future.result(30)


def test_what_cannot_be_drawn_is_told_to_who_asked(service: Service) -> None:
    async def ask() -> None:
        with pytest.raises(UsageError, match="multiples of 8"):
            await service.pipe.generate(service.request(width=1000 * 8))
        with pytest.raises(UsageError, match="strength"):
            await service.pipe.generate(service.request(strength=0.5))
        with pytest.raises(UsageError, match="a Request"):
            await service.pipe.generate("a star")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="deadline"):
            await service.pipe.generate(service.request(), deadline=-1)

    asyncio.run(ask())


@pytest.mark.parametrize("drain", [True, False])
def test_closing_drains_or_ends(demo_bundle: Path, drain: bool) -> None:
    with serving(demo_bundle) as service:
        tickets = [service.scheduler.submit(service.request(seed=seed, num_inference_steps=8)) for seed in range(4)]
        service.scheduler.close(drain=drain)
        with pytest.raises(EngineError, match="the service was closed"):
            service.scheduler.submit(service.request())
        for ticket in tickets:
            if drain:
                assert to_pictures(ticket.future.result(0).result.samples)
            else:
                with pytest.raises(CancelledError, match="the service was closed"):
                    ticket.future.result(0)
        service.scheduler.close()


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fault_39_requests_leave_nothing_behind(service: Service, count: int) -> None:
    """Memory, threads and descriptors are level over many requests; some are cancelled, some fail."""
    service.watched.hook = lambda sample: np.full_like(sample, np.nan if sample[0, 0, 0, 0] > 2 else 0.1)

    async def draw(number: int) -> None:
        request = service.request(f"number {number % 40}", seed=number, num_inference_steps=1, scheduler="ddim")
        waiting = asyncio.ensure_future(service.pipe.generate(request))
        if number % 7 == 0:
            await asyncio.sleep(0)
            waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    async def many(first: int, last: int) -> None:
        for start in range(first, last, 10):
            await asyncio.gather(*map(draw, range(start, start + 10)))

    def held() -> tuple[int, int]:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    asyncio.run(many(0, 50))
    before, peak = held(), peak_megabytes()
    asyncio.run(many(50, 50 + count))
    assert held() == before
    assert peak_megabytes() - peak < 20
    assert (service.scheduler.status.waiting, service.scheduler.status.running) == (0, 0)
