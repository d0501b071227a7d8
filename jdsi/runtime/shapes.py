"""The few shapes that programs are compiled for."""


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def token_bucket(tokens: int) -> int:
    """Padded prompt length: powers of two from 8 to 32, multiples of 64 to 512, then of 128 (FastGen's padding)."""
    if tokens <= 32:
        return max(8, _power_of_two(tokens))
    step = 64 if tokens <= 512 else 128
    return -(-tokens // step) * step


def batch_bucket(rows: int) -> int:
    """Padded batch: powers of two up to 32, then multiples of 32."""
    return _power_of_two(rows) if rows <= 32 else -(-rows // 32) * 32
