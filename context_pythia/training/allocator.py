"""Keeps the memory that a training step frees, instead of fetching it anew from the system in the next step; or the
contrary, where memory matters more than time.

glibc's malloc maps each tensor above its mmap threshold (at most 32 MB) by itself and unmaps it when it is freed. A
training step on a CPU frees and allocates gigabytes of such tensors (the logits above all), and each comes back as
untouched pages that the kernel must clear one by one. At Pythia-70M, batch 32 x 128, bfloat16, that was 1.2 million
page faults and 2.2 to 2.7 s of system time a step; kept memory brought both to nothing, for 0.9 to 1.7 GiB more at the
peak. Transparent huge pages (THP_MEM_ALLOC_ENABLE) saved faults but no system time.
"""

import ctypes
import platform

# From glibc's malloc.h: the option numbers are part of its ABI.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
OWN_MAPPING = 2**20  # bytes from which on an allocation gets a mapping of its own
MOST_MAPPINGS = 65536  # glibc's own
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets the process keep freed memory for its next allocations, from now on; other C libraries are left alone.

    The process holds its peak memory until it ends, so call it where training on a CPU begins.

    Returns:
        Whether the settings took hold (False off glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No allocation gets a mapping of its own, so all come from the heap, and the heap's free top is never given back.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))


def return_freed_memory() -> bool:
    """Lets the process give large tensors back to the system as they are freed, from now on.

    By itself glibc maps fewer of them as larger ones are freed, and what lies in the heap between tensors that live on
    stays with the process: in a pass over a model whose weights are read layer by layer, far more than is alive.

    Returns:
        Whether the settings took hold (False off glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # A threshold that was set is no longer moved.
    return bool(mallopt(M_MMAP_MAX, MOST_MAPPINGS)) and bool(mallopt(M_MMAP_THRESHOLD, OWN_MAPPING))


def use_system_allocator() -> bool:
    """Lets the process allocate as one without settings does once it has freed a few large tensors, from now on.

    Returns:
        Whether the settings took hold (False off glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # what the heap still holds would be used before any new mapping
    # glibc raises its threshold to what was freed, up to 32 MB, and returns the heap's top from twice that on.
    settings = {M_MMAP_MAX: MOST_MAPPINGS, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}
    return all([libc.mallopt(option, value) for option, value in settings.items()])
