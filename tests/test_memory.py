"""Freed memory stays with the process, unless somebody has configured the allocator otherwise."""

import os
import subprocess
import sys

import pytest

from sparse_lm.memory import keep_freed

# 64 MiB, written to and freed eight times, in the main thread and in another one; pages that the system had to give.
COUNT = """
import resource, sys, threading
from sparse_lm.memory import keep_freed

print(keep_freed({}) if sys.argv[1] == "keep" else False)

def fill():
    for _ in range(8):
        b"x" * 2**26

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

fill()
before = faults()
fill()
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print((faults() - before) * resource.getpagesize() / 2**26)
"""


class Library:
    """A C library that notes what it is asked for. answer: of `mallopt`."""

    def __init__(self, answer=1):
        self.asked, self.answer = [], answer
        self.gnu_get_libc_version = lambda: b"2.36"

    def mallopt(self, name, value):
        self.asked.append((name, value))
        return self.answer


def count(word):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", COUNT, word]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    kept, arrays = done.stdout.split()
    return kept == "True", float(arrays)


@pytest.mark.skipif(sys.platform != "linux", reason="only the GNU C library gives memory back so eagerly")
def test_the_system_is_not_asked_again():
    kept, arrays = count("keep")
    assert kept and arrays < 1
    kept, arrays = count("leave")
    assert not kept and arrays > 8  # of the 16


def test_all_three_settings_are_made():
    library = Library()
    assert keep_freed({"HOME": "/root"}, library) is (sys.platform == "linux")
    assert library.asked == ([(-4, 0), (-1, -1), (-8, 1)] if sys.platform == "linux" else [])


def test_a_refusal_is_told():
    assert not keep_freed({}, Library(answer=0))


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_ARENA_MAX": "4"}, {"MALLOC_TRIM_THRESHOLD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.check=1"}],
)
def test_what_the_user_has_set_stays(environment):
    library = Library()
    assert not keep_freed(environment, library)
    assert not library.asked


def test_another_library_is_left_alone():
    library = Library()
    del library.gnu_get_libc_version
    assert not keep_freed({}, library)
    assert not library.asked
