"""The resident process gives back what its threads had for a moment."""

import subprocess
import sys
import textwrap

import pytest

from daemon.machine import memory

CHILD = """
    import re, threading
    from daemon.machine import memory

    def arenas():
        import ctypes, os, tempfile
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        libc.fclose.argtypes = [ctypes.c_void_p]
        libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
        with tempfile.NamedTemporaryFile() as file:
            stream = libc.fopen(file.name.encode(), b"w")
            libc.malloc_info(0, stream)
            libc.fclose(stream)
            return file.read().count(b"<heap nr")

    if {small}:
        assert memory.stay_small()
    done = threading.Event()
    threads = [threading.Thread(target=lambda: (bytearray(20_000), done.wait())) for _ in range(8)]
    for thread in threads:
        thread.start()
    print(arenas())
    done.set()
"""


@pytest.mark.parametrize(("small", "wanted"), [(True, range(1, 2)), (False, range(2, 99))])
def test_threads_share_one_arena(small: bool, wanted: range) -> None:
    """Eight threads that all allocate: one arena, where there would be several."""
    if sys.platform != "linux":
        pytest.skip("mallopt is glibc's")
    script = textwrap.dedent(CHILD).format(small=small)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=".")
    assert int(done.stdout) in wanted


def test_giving_back_is_harmless() -> None:
    """It may be called at any time."""
    memory.give_back()
