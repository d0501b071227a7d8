"""The few shapes that programs are compiled for."""

_SMALL = (1, 2, 4, 8, 16, 32)


def token_bucket(tokens: int) -> int:
    """Padded prompt length: powers of two up to 32, multiples of 64 up to 512, then of 128 (FastGen's padding)."""
    for size in _SMALL[3:]:
        if tokens <= size:
            return size
    step = 64 if tokens <= 512 else 128
    return -(-tokens // step) * step


def batch_bucket(rows: int) -> int:
    """Padded batch: powers of two up to 32, then multiples of 32."""
    for size in _SMALL:
        if rows <= size:
            return size
    return -(-rows // 32) * 32


def capacity_bucket(tokens: int) -> int:
    """Padded KV capacity of a row: multiples of 128."""
    return -(-tokens // 128) * 128
