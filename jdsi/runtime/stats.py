"""What a generation took."""

import dataclasses


@dataclasses.dataclass
class GenerationStats:
    """Counts and times of one `generate` or `stream`. Seconds, compilation included, the consumer's own time not.

    Attributes:
        prompt_tokens, new_tokens: over all requests.
        first_token_seconds: from the start of each batch to its first tokens, summed over batches. A beam search knows
            its tokens only at the end, so all its time counts here.
        decode_seconds: the rest of the time.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time."""
        seconds = self.first_token_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0

    def as_dict(self) -> dict[str, float]:
        """All figures by name."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens; first after "
            f"{self.first_token_seconds:.2f} s, then {self.decode_seconds:.2f} s"
        )
