"""The settings of malloc: what a freed block costs to allocate again, and whether it is returned to the system."""

import platform
import subprocess
import sys

import pytest

from context_pythia.training import allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
# Each case runs in a process of its own, because the settings hold for a whole process.
START = """
import resource
import runpy
from pathlib import Path

letter = b"x"
module = runpy.run_path({path!r})
for name in {settings}:
    module["set_malloc"](module[name])
    letter * 2**26
"""
# A block of 64 MiB is freed and allocated again.
FAULTS = """
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    letter * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# 16 blocks of 8 MiB are freed, each of which lies below a small one that stays.
RESIDENT = """
letter * (30 * 2**20)
blocks = [letter * size for _ in range(16) for size in (2**23, 2**18)]
del blocks[::2]
print(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
"""


def measured(script: str, *settings: str) -> int:
    code = START.format(path=allocator.__file__, settings=settings) + script
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


def test_a_freed_block_is_allocated_again_without_page_faults():
    assert measured(FAULTS, "KEEP_FREED") < measured(FAULTS) / 4 < measured(FAULTS, "KEEP_FREED", "SYSTEM")


def test_freed_blocks_between_others_are_returned():
    assert measured(RESIDENT, "RETURN_FREED") + 100 * 1024 < measured(RESIDENT)  # in KiB
