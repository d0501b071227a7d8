"""The tables of the offload benchmark, for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .report import ratio_text

NOTES = (
    "One pass decodes one token for every row of every batch, and reads every streamed block once; xN: N batches share"
    " it.",
    "All contenders took turns in the same rounds; a ratio is the median of the rounds' ratios (smallest to largest)."
    " Before a pass that is timed goes one that is not, to use up what was read ahead in the others' turns.",
    "disk: the same bytes read with O_DIRECT, 16 MiB at a time, and nothing else. folder: streamed from the safetensors"
    " files as they are. mmap: each block copied out of a mapping of its own when the one before is done with, its"
    " cache dropped first. in memory: the same programs with all weights loaded as they are computed with.",
    "streamed int8, int4: one batch, weights stored in so many bits and dequantised as they come; over disk is over"
    " reading the unquantised ones.",
    "disk-offload, cpu-offload: transformers' model under accelerate in a process of its own, one token of a"
    " generation; weights stored as ours and widened as they are fetched, the files' cache dropped before each pass.",
    "GB/s, bytes/pass: what its process read from storage (/proc/self/io); the latter over the bytes of the streamed"
    " weights.",
    "limits: disk is the time of reading a pass, compute that of a pass in memory for each batch; share: of the longer"
    " one in the time taken.",
    "peak memory: over that of the same work on a model of 0.3 MB; goal: the memory limit given, which is ring,"
    " resident parts, KV cache and 400 MiB.",
)


def passes_table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """All contenders; peak memory comes last."""
    rows = [["what", "a pass", "GB/s", "tokens/s", "over disk", "over mmap", "bytes/pass", "same tokens"]]
    for result in results[:-1]:
        tokens = result["tokens_per_second"]
        rows.append(
            [
                result["what"],
                f"{result['seconds']['median']:.2f} s",
                f"{result['gigabytes_per_second']['median']:.2f}",
                f"{tokens['median']:.2f}" if tokens else "",
                ratio_text(result["over_disk"]),
                ratio_text(result["over_mmap"]),
                f"{result['bytes_per_pass']['median']:.2f}",
                f"{result['equal_tokens']} of {result['compared_tokens']}" if "equal_tokens" in result else "",
            ]
        )
    peak = results[-1]
    rows.append(
        [
            f"peak memory, model of {peak['weights'] / 1e9:.2f} GB",
            f"{peak['peak_over_baseline'] / 1e6:.0f} MB",
            *[""] * 3,
            f"goal {peak['goal'] / 1e6:.0f} MB",
            "within" if peak["within"] else "NOT within",
            "",
        ]
    )
    return rows


def curve_table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Tokens per second over batches per pass, beside what disk and processor allow."""
    rows = [["batches", "tokens/s", "disk allows", "compute allows", "binds", "share of it"]]
    for result in results:
        if not result["what"].startswith("streamed x"):
            continue
        row = [result["what"].partition(" x")[2], f"{result['tokens_per_second']['median']:.2f}"]
        if found := result["limits"]:
            ((binds, _),) = Counter(found["binds"]).most_common(1)
            row += [
                f"{found['disk_tokens_per_second']['median']:.2f}",
                f"{found['compute_tokens_per_second']['median']:.2f}",
                binds,
                ratio_text(found["share"]),
            ]
        rows.append(row + [""] * (6 - len(row)))
    return rows
