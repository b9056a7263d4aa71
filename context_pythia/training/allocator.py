"""Settings of glibc's malloc: keep freed memory for the next training step, or return it where memory is scarce.

glibc maps each tensor above its mmap threshold (at most 32 MB) on its own and unmaps it when it is freed. A training
step on a CPU frees and allocates gigabytes of such tensors, above all logits. The kernel must clear each new page. For
Pythia-70M (batch 32 x 128, bfloat16) this took 1.2 million page faults and 2.2 to 2.7 s of system time a step. A
process that keeps its freed memory has almost none of either, but its peak is 0.9 to 1.7 GiB higher. Transparent huge
pages (THP_MEM_ALLOC_ENABLE) saved page faults but no system time.
"""

import ctypes
import platform

# From glibc's malloc.h: the option numbers are part of its ABI.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
OWN_MAPPING = 2**20  # bytes: larger allocations get their own mapping
MOST_MAPPINGS = 65536  # glibc's default
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on, the process keeps freed memory for its next allocations.

    It keeps its peak memory until it ends, so call this when training on a CPU begins.

    Returns:
        Whether malloc accepted the settings; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # All allocations come from the heap, and malloc never returns the heap's free top.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))


def return_freed_memory() -> bool:
    """From now on, the process returns large tensors to the system as soon as they are freed.

    By default glibc raises its mmap threshold with the size of freed tensors, so later tensors come from the heap. The
    heap cannot return free memory that lies between live tensors. A pass over a model that reads its weights layer by
    layer then keeps much more memory than it uses.

    Returns:
        Whether malloc accepted the settings; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # glibc does not change a threshold that was set explicitly.
    return bool(mallopt(M_MMAP_MAX, MOST_MAPPINGS)) and bool(mallopt(M_MMAP_THRESHOLD, OWN_MAPPING))


def use_system_allocator() -> bool:
    """From now on, the process allocates with glibc's defaults, as they are after it freed a few large tensors.

    Returns:
        Whether malloc accepted the settings; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # otherwise malloc uses the heap's free memory before any new mapping
    # glibc raises its mmap threshold to the freed size, at most 32 MB, and its trim threshold to twice that.
    settings = {M_MMAP_MAX: MOST_MAPPINGS, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}
    return all([libc.mallopt(option, value) for option, value in settings.items()])
