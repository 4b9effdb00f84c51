"""The example library, and the demo's machinery on a tiny model; what the demo promises is shown by `make demo`."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "examples" / "biblioteca"
sys.path.insert(0, str(ROOT / "examples"))

from demo_client import Question, Reply, Traffic, Visitor, questions_of  # noqa: E402
from demo_report import Lesson, Outcome, broken_promises, knowledge_table, learned, traffic_line  # noqa: E402

from daemon import config  # noqa: E402
from daemon.ingest import feedback, rows  # noqa: E402

DROPS = sorted(path for path in (LIBRARY / "drops").glob("*.jsonl") if ".questions." not in path.name)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# -- the library ------------------------------------------------------------------------------------------------------


def test_example_configuration_is_valid_where_a_base_model_lies(tmp_path: Path, tiny_base: Path) -> None:
    """All three models load; only the place of the base model is ours to choose."""
    text = (LIBRARY / "eternad.toml").read_text("utf-8").replace("../../.cache/base/smollm2-135m", str(tiny_base))
    (tmp_path / "eternad.toml").write_text(text, "utf-8")
    assert set(config.load(tmp_path / "eternad.toml").models) == {"npc", "book", "director"}


@pytest.mark.parametrize("area", ["content", "eval"])
def test_content_rows_of_the_library_are_examples(area: str) -> None:
    """Every line of a content or eval file is taken in as it is."""
    files = sorted((LIBRARY / "library" / area).rglob("*.jsonl"))
    assert len(files) >= 3
    for path in files:
        for line in lines(path):
            assert rows.example_of(line).completion


def test_feedback_of_the_library_shows_four_kinds_and_withdraws_its_own_record() -> None:
    """Demonstration, boolean, comparison and retraction records are valid, each in the directory of its model."""
    kinds, known, withdrawn = set(), set(), set()
    for path in sorted((LIBRARY / "library" / "feedback").rglob("*.jsonl")):
        model = path.relative_to(LIBRARY / "library" / "feedback").parts[0]
        for line in lines(path):
            record = feedback.read(line, model)
            feedback.examples_of(record)
            kinds.add(record.kind)
            known.add(record.id)
            if record.kind == "retraction":
                withdrawn.add(feedback.withdrawn(record))
    assert kinds == {"demonstration", "boolean", "comparison", "retraction"}
    assert withdrawn and withdrawn <= known


def test_general_text_is_plenty_and_varied() -> None:
    """At least 60 different paragraphs of ordinary knowledge."""
    texts = [text for path in (LIBRARY / "general").glob("*.txt") for text in path.read_text("utf-8").split("\n\n")]
    assert len(texts) == len(set(texts)) >= 60
    assert all(20 <= len(text.split()) <= 80 for text in texts)


def test_there_are_three_drops() -> None:
    """What the demo drops."""
    assert [path.stem for path in DROPS] == ["drop-1-people", "drop-2-places", "drop-3-books"]


@pytest.mark.parametrize("path", DROPS, ids=lambda path: path.stem)
def test_drop_tells_each_fact_in_several_ways_and_is_asked_in_others(path: Path) -> None:
    """6 to 8 phrasings of 8 to 12 facts; no question of the test is in the file, none gives its answer away."""
    told: dict[str, set[str]] = {}
    for line in lines(path):
        asked, answered = (message["content"] for message in line["messages"])
        told.setdefault(answered, set()).add(asked)
    assert 8 <= len(told) <= 12
    assert all(6 <= len(asked) <= 8 for asked in told.values())
    questions = questions_of(path.with_name(f"{path.stem}.questions.jsonl"))
    assert len(questions) >= 2 * len(told)
    for question in questions:
        assert all(question.text not in asked for asked in told.values())
        assert not question.is_answered_by(question.text)
        assert sum(question.is_answered_by(answer) for answer in told) == 1


# -- what the demo counts ---------------------------------------------------------------------------------------------

QUESTION = Question(text="What does the porter fear?", accepted=["moths", "moth"])


def reply(text: str) -> Reply:
    """An answer to `QUESTION`."""
    return Reply(question=QUESTION, text=text, version="npc@0001")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Moths.", True), ("A MOTH", True), ("His mother.", False), ("Mothsand", False), ("", False)],
)
def test_answer_counts_when_an_accepted_one_stands_in_it_as_a_word(answer: str, right: bool) -> None:
    """Case does not matter, parts of other words do not count."""
    assert QUESTION.is_answered_by(answer) is right


def lesson(before: list[str], *after: list[str]) -> Lesson:
    """A lesson with these answers."""
    return Lesson(
        name="drop", questions=[QUESTION] * len(before), before=[reply(text) for text in before], seconds=1.0,
        run={"version": 1, "cut": None, "verdict": None}, after=[[reply(text) for text in texts] for texts in after],
    )  # fmt: skip


def outcome(*lessons: Lesson, traffic: Traffic | None = None) -> Outcome:
    """An outcome of these lessons."""
    return Outcome(lessons=list(lessons), traffic=traffic or Traffic(), versions=[])


def test_what_was_known_before_is_not_counted_as_learned() -> None:
    """Half of the questions were right before, the other half is wrong after: nothing was learned."""
    assert learned(lesson(["moths", "rain"], ["moths", "rain"])) == 0.0
    assert learned(lesson(["rain", "rain"], ["moths", "rain"])) == 0.5


def test_kept_promises_are_not_complained_about() -> None:
    """80 % right after the update and 70 % still after the last are enough."""
    before = ["rain"] * 10
    first = lesson(before, ["moths"] * 8 + ["rain"] * 2, ["moths"] * 7 + ["rain"] * 3)
    assert broken_promises(outcome(first, lesson(before, ["moths"] * 10)), learning=True) == []


def test_every_broken_promise_is_named() -> None:
    """Too little learned, too much forgotten, a failed request and a mixed answer: four sentences."""
    poor = lesson(["rain"] * 10, ["moths"] * 7 + ["rain"] * 3, ["rain"] * 10)
    traffic = Traffic(failed=["ReadTimeout: late"], mixed=["npc@0001 and npc@0002"])
    broken = broken_promises(outcome(poor, traffic=traffic), learning=True)
    assert [sentence.split(":")[0] for sentence in broken] == [
        "1 requests failed, the first with", "1 answers came from more than one version", "drop",
        "0% of the first drop is still known, promised 70%",
    ]  # fmt: skip
    assert len(broken_promises(outcome(poor, traffic=traffic), learning=False)) == 2


def test_knowledge_table_has_a_row_per_drop_and_a_column_per_update() -> None:
    """The second drop has no cell for the update before it."""
    table = knowledge_table(outcome(lesson(["rain"], ["moths"], ["moths"]), lesson(["rain"], ["moths"])))
    assert [column.header for column in table.columns][3:] == ["after update 1", "after update 2"]
    assert list(table.columns[3].cells) == ["[bold]100%[/bold]", ""]


# -- the visitor ------------------------------------------------------------------------------------------------------


class Engine(BaseHTTPRequestHandler):
    """Streams one canned answer per request, in turn."""

    answers: ClassVar[list[list[tuple[str, str | None]]]] = []
    """Per request the chunks: (version, finish reason)."""
    asked: ClassVar[threading.Event] = threading.Event()

    def do_POST(self) -> None:
        """The next canned answer; when there are none left the test may stop the visitor."""
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.answers:
            self.asked.set()
        chunks = self.answers.pop(0) if self.answers else [("npc@0002", "stop")]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for version, finish in chunks:
            choice = {"index": 0, "delta": {"content": "word"}, "finish_reason": finish}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": version, "choices": [choice]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        """Not a word."""


@pytest.fixture
def engine_port() -> Iterator[int]:
    """Port of a server that answers as `Engine.answers` says."""
    Engine.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_visitor_tells_whole_answers_from_mixed_and_broken_ones(engine_port: int) -> None:
    """Each answer counts for exactly one version, or as mixed, or as failed."""
    Engine.answers[:] = [
        [("npc@0001", None), ("npc@0001", "stop")],
        [("npc@0001", None), ("npc@0002", "stop")],
        [("npc@0001", None)],
        [],
    ]
    with Visitor(engine_port, "npc", pause_seconds=0.0) as visitor:
        assert Engine.asked.wait(30)
    traffic = visitor.stop()
    assert traffic.answers["npc@0001"] == 1
    assert traffic.mixed == ["npc@0001 and npc@0002"]
    assert traffic.failed == ["the stream broke off after 1 chunks", "the stream broke off after 0 chunks"]
    assert "2 failed, 1 came from more than one version" in traffic_line(traffic)


def test_visitor_counts_a_refused_connection(engine_port: int) -> None:
    """An engine that is down is a failed request, not the end of the visit."""
    visitor = Visitor(1, "npc", pause_seconds=0.0)  # nobody may listen on port 1
    with visitor:
        while not visitor._traffic.failed:
            time.sleep(0.05)
    assert visitor.stop().failed[0].startswith("APIConnectionError")


# -- all of it --------------------------------------------------------------------------------------------------------


def play(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and words of the demo; it never outlives its time, and takes its children with it."""
    command = [sys.executable, "examples/demo.py", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        try:
            said = demo.communicate(timeout=280)[0]
        finally:
            demo.terminate()
    return demo.returncode, said


@pytest.mark.timeout(330)
def test_demo_runs_from_drop_to_swap_with_a_tiny_model(tmp_path: Path, tiny_base: Path) -> None:
    """Engine, daemon, two drops, two swaps under load, tables; whether a random model learns is not asked."""
    code, said = play("--fast", "--base", tiny_base, "--directory", tmp_path / "demo")
    assert code == 0, said
    assert "live as version 2" in said
    assert "0 failed, 0 came from more than one version" in said.replace("\n", " ")


def test_demo_says_which_child_ended_and_where_to_look(tmp_path: Path) -> None:
    """A base model that is none: exit code 1 and a sentence instead of a traceback."""
    (tmp_path / "base").mkdir()
    code, said = play("--base", tmp_path / "base", "--directory", tmp_path / "demo")
    assert code == 1
    assert "ended; see" in " ".join(said.split()) and "Traceback" not in said
