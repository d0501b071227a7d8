"""Measurements that anyone can repeat: decoding, prefill, memory and start-up, beside limits and peers of the same run.

Machines differ, and one machine differs from minute to minute. So nothing here is compared with a number from another
run: all contenders take turns in rounds (see `interleave`), and what is reported is the median of the ratios within
rounds, with the smallest and the largest.
"""

from .decode import bench_decode
from .memory import bench_memory
from .prefill import bench_prefill
from .rounds import Ratio, interleave
from .start import bench_start

__all__ = ["Ratio", "bench_decode", "bench_memory", "bench_prefill", "bench_start", "interleave"]
