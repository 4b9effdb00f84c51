"""`python tests/fuzz_atheris.py TARGET SECONDS`: one parser under atheris (libFuzzer), led by coverage.

Ends with 77 and the input in `.fuzz/` when a parser raises anything but a `Problem`, takes longer than 60 s, or more
memory than 2 GiB.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["daemon", "buffers"]):
    import fuzz_targets

ROOT = Path(__file__).resolve().parent.parent


def main(name: str, seconds: str) -> None:
    """Fuzz one target for a while; what covers something new is kept for the next time."""
    corpus = ROOT / ".cache" / "fuzz" / "corpus" / name
    found = ROOT / ".fuzz"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    for number, seed in enumerate(fuzz_targets.SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=2048", "-max_len=16384",
        f"-artifact_prefix={found}/{name}-", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], fuzz_targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
