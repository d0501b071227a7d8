"""What the kernels of several operators share in Triton."""

import triton
import triton.language as tl


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """int8 or float8_e4m3fn as bfloat16 or float16, exactly; others as they are.

    Launches pass float8_e4m3fn as uint8, for Triton knows the type on GPUs since 8.9 only. Its bits one to the left are
    those of a float16 that is 256 times smaller, subnormal numbers included. There are no infinities; NaN becomes 480.
    """
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(DTYPE)
    else:
        return x.to(DTYPE)
