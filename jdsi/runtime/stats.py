"""What a generation or classification took."""

import dataclasses
from typing import Any

from .weight_stream import StreamReport


@dataclasses.dataclass
class GenerationStats:
    """Counts and times of one `generate` or `stream`. Seconds, compilation included, the consumer's own time not.

    Of a `classify` or `pool` too, all of whose time is that to the first tokens.

    Attributes:
        prompt_tokens, new_tokens: over all requests.
        first_token_seconds: from the start of each batch to its first tokens, summed over batches. A beam search knows
            its tokens only at the end, so all its time counts here.
        decode_seconds: the rest of the time.
        peak_memory_bytes: the most this process has held so far, and the device, where it is not the same memory.
        stream: what fetching weights took, where they do not stay on the device.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_bytes: int | None = None
    stream: StreamReport | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time."""
        seconds = self.first_token_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All figures by name; if weights were streamed, also what follows from these.

        That is GB/s, the share of the time that the link was busy, bytes for each pass over the model, and which share
        of the reading was hidden behind computations.
        """
        figures: dict[str, Any] = dataclasses.asdict(self) | {"tokens_per_second": self.tokens_per_second}
        if self.stream is not None:
            seconds = (self.first_token_seconds + self.decode_seconds) or 1.0
            figures["stream"] |= {
                "gigabytes_per_second": self.stream.bytes_streamed / seconds / 1e9,
                "link_busy": min(1.0, self.stream.read_seconds / seconds),
                "bytes_per_pass": self.stream.bytes_streamed / max(1, self.stream.passes),
                "hidden": max(0.0, 1 - self.stream.wait_seconds / (self.stream.read_seconds or 1.0)),
            }
        return figures

    def summary(self) -> str:
        """A line for people; two if weights were streamed."""
        text = (
            f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens; first after "
            f"{self.first_token_seconds:.2f} s, then {self.decode_seconds:.2f} s"
        )
        if self.stream is None:
            return text
        stream = self.as_dict()["stream"]
        text = (
            f"{text}\nstreamed {stream['bytes_streamed'] / 1e9:.2f} GB in {stream['passes']} passes of "
            f"{stream['bytes_per_pass'] / 1e9:.2f} GB at {stream['gigabytes_per_second']:.2f} GB/s, link busy "
            f"{stream['link_busy']:.0%} of the time, {stream['hidden']:.0%} of it hidden behind computing; "
            f"peak memory {self.peak_memory_bytes / 1e9:.2f} GB"
        )
        if self.peak_device_bytes is not None:
            text += f", of the device {self.peak_device_bytes / 1e9:.2f} GB"
        if self.stream.kv_bytes_read or self.stream.kv_bytes_written:
            text += (
                f"\nkeys and values: {self.stream.kv_bytes_read / 1e9:.2f} GB came and "
                f"{self.stream.kv_bytes_written / 1e9:.2f} GB went, waited for {self.stream.kv_wait_seconds:.2f} s"
            )
        return text
