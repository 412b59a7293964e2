"""Freed arrays are used again instead of being taken from the system anew."""

import os
import platform
import subprocess
import sys

import pytest

from recbole_mm.memory import keep_freed_memory

PROGRAM = """
import ctypes, resource, sys
import torch
from recbole_mm.memory import keep_freed_memory
ctypes.CDLL(None).mallopt(-3, 1 << 20)  # what glibc begins with, more or less; it changes with what was freed before
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def batch():
    return [torch.ones(9_000_000 // 4) for _ in range(4)]
for _ in range(3):
    batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_of_a_batch_serves_the_next(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    }
    assert faults["keep"] * 4 < faults["default"], faults


def test_the_users_choice_counts(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
