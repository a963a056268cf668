"""Work side by side in threads, each with one thread of torch.

On a CPU, passes as small as those of a tiny denoiser are faster with a thread of torch per part than with all threads
on each. Torch's own threads wait for each other after every operation, and long where another program needs a core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import Queue
from threading import Event, Thread
from typing import TypeVar, cast

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count(device: torch.device) -> int:
    """How many parts run side by side on a device: torch's threads on a CPU, elsewhere one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def merged(parts: Sequence[Callable[[], Iterator[Item]]]) -> Iterator[Item]:
    """What several iterators yield, in the order in which it comes; each runs in a thread of its own.

    Once the caller stops, or one part fails, the others end with their next item.

    Args:
        parts: each makes an iterator; called in its thread. One alone runs in the caller's thread, with all of torch's.

    Raises:
        Exception: the first that a part raised.
    """
    if len(parts) == 1:
        yield from parts[0]()
        return
    items: Queue[tuple[Item | None, BaseException | None, bool]] = Queue()
    stopped, threads = Event(), torch.get_num_threads()

    def work(part: Callable[[], Iterator[Item]]) -> None:
        try:
            torch.set_num_threads(1)
            for item in part():
                if stopped.is_set():
                    break
                items.put((item, None, False))
        except BaseException as error:
            items.put((None, error, False))
        finally:
            items.put((None, None, True))

    workers = [Thread(target=work, args=(part,), daemon=True) for part in parts]
    try:
        for worker in workers:
            worker.start()
        running = len(workers)
        while running:
            item, error, ended = items.get()
            if error:
                raise error
            running -= ended
            if not ended:
                yield cast(Item, item)
    finally:
        stopped.set()
        for worker in workers:
            worker.join()
        torch.set_num_threads(threads)  # threads of others start with what was set last


def side_by_side(parts: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of several calls, in their order; each runs in a thread of its own. Raises as `merged`."""

    def one(number: int, part: Callable[[], Result]) -> Iterator[tuple[int, Result]]:
        yield number, part()

    results = dict(merged([partial(one, number, part) for number, part in enumerate(parts)]))
    return [results[number] for number in range(len(parts))]
