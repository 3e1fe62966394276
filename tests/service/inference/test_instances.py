"""The estimates that instances give; what they run is tested through the batcher."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from export.engines.base import Images, Logits
from service.inference.instances import Batch, Instances
from service.inference.queues import Queue, Waiting

_CALL_S = 0.05


def slow(images: Images) -> Logits:
    time.sleep(_CALL_S)
    return images[:, :, 0, 0]


def request(*, after_s: float = 0.0) -> Waiting:
    answer = asyncio.get_running_loop().create_future()
    arrived_ns = time.monotonic_ns() + round(after_s * 1e9)
    return Waiting(np.zeros((1, 1, 1, 1), np.float32), answer, level=0, arrived_ns=arrived_ns)


@pytest.mark.parametrize("after_s", [0.0, 60.0])
async def test_an_estimate_is_believed_for_a_while_and_then_tried_again(*, after_s: float) -> None:
    ran: asyncio.Queue[Batch] = asyncio.Queue()
    queue = Queue(levels=1, bound=8)
    instances = Instances(
        [slow],
        name="model@1",
        max_batch=8,
        queue=queue,
        delay_ns=0,
        preferred=frozenset(),
        answered=ran.put_nowait,
        late=list.clear,
    )
    assert instances.expected_ns(request()) == (0, 0)
    assert instances.enter(request())
    assert (await ran.get()).error is None
    # The answer comes before its thread is free again, which this waits for.
    await instances.close()
    wait_ns, run_ns = instances.expected_ns(request(after_s=after_s))
    assert wait_ns == 0
    assert run_ns == 0 if after_s else run_ns >= _CALL_S * 1e9
