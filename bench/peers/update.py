"""Fixed costs: one update of 64 examples as the daemon starts it, the imports, the size of the installation."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import msgspec

from bench.peers.work import Work, child
from buffers.example import Example, Message
from buffers.experience import Role, Row
from strategies.catalog import Distill, Replay
from strategies.lore import Fact, generate
from strategies.request import Lora, RunRequest, Training, read_progress, read_report, write

ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTS = {
    "import of the trainer": "import strategies.train",
    "import of the daemon": "import daemon.service",
    "import of the command line": "import daemon.cli",
}
POLL_SECONDS = 0.02
REPEATS = 3


def row(role: Role, fact: Fact, wording: int) -> Row:
    """One question and its answer."""
    asked = Message(role="user", content=question_of(fact, wording))
    example = Example(shape="demonstration", prompt=(asked,), completion=fact.answer + ".")
    return Row(role=role, update=1, id=1, example=example)


def fact_lines(seed: int, count: int) -> list[bytes]:
    """Invented questions and answers as a writer drops them: lines of chat messages."""
    return [
        msgspec.json.encode({"messages": [
            {"role": "user", "content": question_of(fact, 0)}, {"role": "assistant", "content": fact.answer + "."},
        ]}) + b"\n"
        for fact in generate(seed, 1, count)[0]
    ]  # fmt: skip


def question_of(fact: Fact, wording: int) -> str:
    """The bare question."""
    return fact.trained[wording].removeprefix("Question: ").removesuffix("\nAnswer:")


def text_rows(general: Path) -> list[Row]:
    """Four general texts to rehearse and 16 on which the drift is measured."""
    texts = [text.strip() for file in sorted(general.glob("*.txt")) for text in file.read_text("utf-8").split("\n\n")]
    return [
        Row(role="general" if place < 4 else "probe", update=0, id=0, example=Example(shape="text", completion=text))
        for place, text in enumerate(texts[:20])
    ]


def prepare(work: Work, run: Path) -> None:
    """The directory of a run with 64 new examples, 16 hold-outs of them, 16 examples of `eval/`, general text."""
    facts = generate(work.seed, 1, 96)[0]
    made = [row("new", fact, 0) for fact in facts[:64]]
    made += [row("heldout_new", fact, 1) for fact in facts[:16]] + [row("eval", fact, 1) for fact in facts[64:80]]
    made += text_rows(Path(work.texts[0]))
    run.mkdir()
    body = b"".join(msgspec.json.encode(one) + b"\n" for one in made)
    (run / "experience.jsonl").write_bytes(body)
    request = RunRequest(
        run_id=run.name, model="bench", update_number=1, base_path=Path(work.base),
        experience_sha256=hashlib.sha256(body).hexdigest(), lora=Lora(rank=work.rank, alpha=work.alpha),
        training=Training(epochs=1), strategies=[Replay(ratio=0.0, general_ratio=0.05), Distill(on="general")],
        canary_prompts=["Who keeps the clock?", "Where is the salt archive?"], general_cache=run.parent / "cache",
    )  # fmt: skip
    write(run / "request.json", request)


def update(work: Work, directory: Path) -> dict[str, float]:
    """One run, watched from outside."""
    run = directory / "run"
    prepare(work, run)
    spawned = time.time()
    trainer = subprocess.Popen([sys.executable, "-m", "strategies.train", str(run)], cwd=ROOT)
    first = last = 0.0
    while trainer.poll() is None:
        progress = read_progress(run)
        if not first and progress is not None and progress.step:
            first = progress.at
        if not last and progress is not None and progress.steps and progress.step == progress.steps:
            last = progress.at
        time.sleep(POLL_SECONDS)
    ended, used, report = time.time(), os.times(), read_report(run)
    if report is None or report.status != "trained":
        raise RuntimeError(f"the update failed: {report}")
    reported = (run / "report.json").stat().st_mtime
    phases = {f"phase {name}": seconds for name, seconds in report.seconds.items()}
    return phases | {
        "spawn to first step": first - spawned, "last step to report": reported - last,
        "report to exit": ended - reported, "whole update": ended - spawned,
        "CPU of the whole update": used.children_user + used.children_system,
    }  # fmt: skip


def imports() -> dict[str, float]:
    """CPU seconds of a fresh interpreter with one import, best of `REPEATS`, less those of an empty one."""
    empty = interpreter("pass")
    return {name: interpreter(code) - empty for name, code in IMPORTS.items()}


def interpreter(code: str) -> float:
    """CPU seconds of `python -c code`."""
    found = []
    for _ in range(REPEATS):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        after = os.times()
        found.append(sum(after[2:4]) - sum(before[2:4]))
    return min(found)


def installed_bytes() -> float:
    """Size of all files of the default set (`requirements.lock`), without compiled bytecode."""
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    return float(sum(size_of(line.partition("==")[0].strip()) for line in lines if "==" in line))


def size_of(package: str) -> int:
    """Bytes of one distribution's files; 0 where it is not installed here."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return 0
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def measure(work: Work, _: str) -> dict[str, float]:
    """All of it."""
    with tempfile.TemporaryDirectory() as directory:
        return {**update(work, Path(directory)), **imports(), "installed, bytes": installed_bytes()}


if __name__ == "__main__":
    child(measure)
