"""Tests for keeping freed memory: a large block that is freed and made again costs no page faults."""

import platform
import subprocess
import sys

import pytest

from context_pythia.training import allocator

# Run by itself, because the settings hold for a whole process. A block has 64 MiB.
COUNT_FAULTS = """
import resource
import runpy

letter = b"x"
for name in {settings}:
    runpy.run_path({path!r})[name]()
    for _ in range(4):
        letter * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    letter * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*settings: str) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS.format(settings=settings, path=allocator.__file__)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_a_freed_block_is_made_again_without_page_faults():
    assert page_faults("keep_freed_memory") < page_faults() / 4
    assert page_faults("keep_freed_memory", "use_system_allocator") > page_faults() / 4


# 16 blocks of 8 MiB are freed, each of which lies below a small one that stays.
COUNT_RESIDENT = """
import re
import runpy
from pathlib import Path

letter = b"x"
if {give}:
    runpy.run_path({path!r})["return_freed_memory"]()
letter * (30 * 2**20)
blocks = [letter * size for _ in range(16) for size in (2**23, 2**18)]
del blocks[::2]
print(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_blocks_between_others_are_given_back():
    resident = [
        int(subprocess.check_output([sys.executable, "-c", COUNT_RESIDENT.format(give=give, path=allocator.__file__)]))
        for give in (True, False)
    ]
    assert resident[0] + 100 * 1024 < resident[1]  # in KiB
