"""Settings of glibc's malloc: keep freed memory for the next training step, or return it where memory is scarce.

glibc maps each tensor above its mmap threshold (at most 32 MB) on its own and unmaps it when it is freed. A training
step on a CPU frees and allocates gigabytes of such tensors, above all logits. The kernel must clear each new page. For
Pythia-70M (batch 32 x 128, bfloat16) this took 2.2 to 2.7 s of system time a step. A process that keeps its freed
memory takes almost none, but its peak is 0.9 to 1.7 GiB higher.
"""

import ctypes
import platform

# From glibc's malloc.h: the option numbers are part of its ABI.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4

# All allocations come from the heap, and malloc never returns the heap's free top.
KEEP_FREED = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
# Each tensor above 1 MB is returned to the system as soon as it is freed. By default glibc raises its mmap threshold
# with the size of freed tensors, so later ones come from the heap, which cannot return memory between live tensors.
RETURN_FREED = {MMAP_MAX: 65536, MMAP_THRESHOLD: 2**20}
# glibc's defaults, as they are after the process freed a few large tensors.
SYSTEM = {MMAP_MAX: 65536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}


def set_malloc(options: dict[int, int]) -> None:
    """Set malloc's options for the rest of the process; other C libraries than glibc are left alone."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # otherwise malloc uses the heap's free memory before any new mapping
        for option, value in options.items():
            libc.mallopt(option, value)
