"""Lengths that programs are compiled for. Every combination of lengths is compiled once, which takes seconds."""

import bisect

SIZES = (64, 128, 192, *(64 * factor * 2**power for power in range(13) for factor in (4, 5, 6, 7)))
"""64, 128, 192, 256, 320, 384, 448, 512, 640, ...; above 256, a length is at most a quarter larger than necessary."""
COARSE_SIZES = (64, 128, *(128 * factor * 2**power for power in range(13) for factor in (2, 3)))
"""64, 128, 256, 384, 512, 768, ..., for prefixes and caches. Larger ones cost little: a prefix is computed once for a
group of prompts, and a cache is read in blocks. With `SIZES`, five-shot MMLU would need 101 programs, not 57."""


def padded_size(needed: int) -> int:
    """The smallest of `SIZES` for `needed` tokens of a prompt."""
    return SIZES[bisect.bisect_left(SIZES, needed)]


def coarse_size(needed: int) -> int:
    """The smallest of `COARSE_SIZES` for `needed` tokens of a prefix or of a cache."""
    return COARSE_SIZES[bisect.bisect_left(COARSE_SIZES, needed)]


def power_of_two(needed: int) -> int:
    """The smallest power of two that is not below `needed`: of rows, or of chunks."""
    return 1 << (needed - 1).bit_length()
