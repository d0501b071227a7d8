"""Work on the blocks of a tensor, shared out among a few threads."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""One thread neither keeps a disk busy nor gets pages from the system as fast as a device could take them; a few do."""


def share_out(work: Callable[[Sequence[int]], None], items: Sequence[int]) -> None:
    """Has `work` done to all items, by several threads at a time each of which takes its part of them.

    What it raises in a thread is raised here, once all threads have ended.
    """
    count = min(THREADS, len(items))
    if count < 2:
        work(items)
        return
    with ThreadPoolExecutor(count, thread_name_prefix="jdsi-load") as pool:
        jobs = [pool.submit(work, items[first::count]) for first in range(count)]
    for job in jobs:
        job.result()
