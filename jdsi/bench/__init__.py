"""Measurements that anyone can repeat, from one operator to a start of the program, beside limits and peers.

Machines differ, and one machine differs from minute to minute. So nothing here is compared with a number from another
run: all contenders take turns in rounds (see `interleave`), and what is reported is the median of the ratios within
rounds, with the smallest and the largest.
"""

from .decode import bench_decode
from .kernel_tuning import Change, Failure, tune_kernels
from .kernels import Selection, bench_kernels
from .memory import bench_memory
from .offload import bench_offload
from .parallel import bench_parallel
from .prefill import bench_prefill
from .rounds import Ratio, interleave
from .start import bench_start

__all__ = [
    "Change",
    "Failure",
    "Ratio",
    "Selection",
    "bench_decode",
    "bench_kernels",
    "bench_memory",
    "bench_offload",
    "bench_parallel",
    "bench_prefill",
    "bench_start",
    "interleave",
    "tune_kernels",
]
