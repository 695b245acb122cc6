"""Block-wise quantization of a flat float32 vector, and the packing of two 4-bit levels into a byte.

Each run of `block` values is divided by its own scale, the block's largest magnitude over the largest level, and
rounded to a whole level (half to even). One outlier then costs precision in its block only: the block-wise scales of
Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR 2022, section 2.1, here
with evenly spaced levels. The last block may be short.

    scales, levels = np.empty(num_blocks(n, block), "f4"), np.empty(n, "i1")
    quantize_(scales, levels, x, block, max_level=127)
    dequantize(scales, levels, block)        # within half a level of x: absmax(block) / (2 * max_level)

Pure functions of their arguments. Each step is one correctly rounded operation per value, so the bits depend neither
on the machine nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

_RUN = 131_072
"""Values worked on at a time: the temporaries (512 KiB of float32 each) stay in a second-level cache."""

_SMALLEST_ABSMAX = 1e-30
"""A block below it is coded as zeros: `max_level / absmax` overflows float32 from about 4e-37 on down."""


def tensor(array: np.ndarray) -> torch.Tensor:
    """`array` as a tensor over the same memory, only to be read.

    Not `torch.from_numpy`, which warns about the read-only arrays that received buffers and stored versions are.
    """
    return torch.from_dlpack(array)


def num_blocks(n: int, block: int) -> int:
    """Number of scales that `n` values need."""
    return -(-n // block)


def quantize_(scales: np.ndarray, levels: np.ndarray, x: np.ndarray, block: int, max_level: int) -> None:
    """Fill `scales` (f32[num_blocks]) and `levels` (i8[n], within +-`max_level`) from `x` (f32[n]).

    A block that holds a value that is not finite gets a scale that is not finite; its levels then mean nothing.
    """
    source, scale_of, level_of = tensor(x), torch.from_numpy(scales), torch.from_numpy(levels)
    scratch = torch.empty(min(x.size, max(_RUN, block)), dtype=torch.float32)
    for start, stop, first, width in _runs(x.size, block):
        values = source[start:stop].view(-1, width)
        scaled = scratch[: stop - start].view(-1, width)
        absmax = torch.abs(values, out=scaled).amax(1)
        negligible = absmax < _SMALLEST_ABSMAX
        scale_of[first : first + len(absmax)] = (absmax / max_level).masked_fill_(negligible, 0.0)
        inverse = (max_level / absmax).masked_fill_(negligible, 0.0)
        torch.mul(values, inverse[:, None], out=scaled).round_()
        level_of[start:stop].view(-1, width).copy_(scaled)


def dequantize(scales: np.ndarray, levels: np.ndarray, block: int) -> np.ndarray:
    """`levels` (i8[n]) times the `scales` (f32[num_blocks]) of their blocks: f32[n]."""
    x = np.empty(levels.size, np.float32)
    scale_of, level_of, values = tensor(scales), tensor(levels), torch.from_numpy(x)
    for start, stop, first, width in _runs(x.size, block):
        rows = values[start:stop].view(-1, width)
        rows.copy_(level_of[start:stop].view(-1, width)).mul_(scale_of[first : first + len(rows), None])
    return x


def pack_nibbles(levels: np.ndarray) -> np.ndarray:
    """Two levels (i8[n], within -8..7) to a byte, the first in its low half: u8[ceil(n / 2)], odd n padded with 0."""
    if levels.size % 2:
        levels = np.append(levels, np.int8(0))
    # A pair is one 16-bit number: shifts of whole arrays run 8 times faster than slices with a step of two.
    pairs = levels.view("<u2")
    return ((pairs & 0x0F) | ((pairs >> 4) & 0xF0)).astype(np.uint8)


def unpack_nibbles(packed: np.ndarray, n: int) -> np.ndarray:
    """The first `n` levels (i8[n], within -8..7) of `packed` (u8[ceil(n / 2)])."""
    pairs = packed.astype("<u2")
    raised = ((pairs << 4) & 0x00F0) | ((pairs << 8) & 0xF000)  # each level in the high half of its byte
    return (raised.view(np.int8) >> 4)[:n]  # the shift of a signed byte restores the sign


def _runs(n: int, block: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut n values into runs of whole blocks and the short last block: (start, stop, first block, block length)."""
    whole = n - n % block
    step = max(1, _RUN // block) * block
    for start in range(0, whole, step):
        yield start, min(start + step, whole), start // block, block
    if whole < n:
        yield whole, n, whole // block, n - whole
