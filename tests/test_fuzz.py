"""Mutated files of every format are read or refused: no parser raises anything but a `Problem`.

`make fuzz` looks for the same with atheris, which is led by coverage.
"""

import pytest
from fuzz_targets import SEEDS, TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st

DICTIONARY = [
    b"", b"\0", b"\n", b'"', b"{", b"}", b"[", b"]", b"<", b"</", b"&", b"---\n", b"\xff", b"\xed\xa0\x80", b"1e999",
    b"NaN", b"9" * 5000, b"\\ud800", b"\xe2\x80\xa8", b"../", b"%s", b"*a", b"&a", b"<!DOCTYPE a [<!ENTITY b 'c'>]>&b;",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good file with a few places changed, cut out or doubled; sometimes no file at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(start + draw(st.integers(0, 12)), len(data))
        part = draw(st.sampled_from(DICTIONARY) | st.binary(max_size=8) | st.just(data[start:end] * 3))
        data = data[:start] + part + data[end:]
    return data


def check(name: str, examples: int) -> None:
    """Run one target with so many files."""

    @settings(max_examples=examples, deadline=10_000)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        TARGETS[name](data.draw(mutated(SEEDS[name])))

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_reads_or_refuses(name: str) -> None:
    """A few dozen files for each."""
    for seed in SEEDS[name]:
        TARGETS[name](seed)
    check(name, 25)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_reads_or_refuses_thousands(name: str) -> None:
    """3,000 files for each."""
    check(name, 3000)
