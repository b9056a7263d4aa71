"""Tests for keeping freed memory: a large block that is freed and made again costs no page faults."""

import platform
import subprocess
import sys

import pytest

from context_pythia.training import allocator

# Run by itself, because the settings hold for a whole process and cannot be taken back. A block has 64 MiB.
COUNT_FAULTS = """
import resource
import runpy

letter = b"x"
if {keep}:
    assert runpy.run_path({path!r})["keep_freed_memory"]()
for _ in range(4):
    letter * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    letter * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS.format(keep=keep, path=allocator.__file__)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_a_freed_block_is_made_again_without_page_faults():
    assert page_faults(keep=True) < page_faults(keep=False) / 4


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
