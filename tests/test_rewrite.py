"""New examples in other words: what is derived, what never is, and that it is frozen, cached and erased."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_train import FACTS, demonstration, make_run

from buffers import experience
from buffers.example import Example, Message, content_hash
from buffers.experience import Row
from daemon import erasure
from strategies import rewriting, teacher
from strategies.catalog import Rewrite
from strategies.derive import derive
from strategies.failure import Failure
from strategies.pulse import Pulse
from strategies.teacher import teacher_of
from strategies.train import attempt

RULES = Rewrite(rows=3)
TAUGHT = Rewrite(rows=3, templates=False, sentences=False, paraphrases=True, questions=True)
TEXT = Example(shape="text", completion="The porter is called Orso. He fears moths since 1402. Nobody laughs at him.")


def asked(question: str, answer: str = "In hall 3.") -> Example:
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content=question))
    return Example(shape="demonstration", prompt=prompt, completion=answer)


def row(example: Example, role: str = "new", identity: int = 7) -> Row:
    return Row(role=role, update=2, id=identity, example=example)  # type: ignore[arg-type]


def no_teacher(order: str) -> str:
    raise AssertionError(f"nobody was to be asked: {order}")


def derived(*rows: Row, by: Rewrite = RULES, asking: Any = no_teacher, cache: Path | None = None) -> list[Row]:
    return list(derive(rows, by, asking, cache, chat=True))


def test_a_question_is_asked_in_other_frames_and_its_answer_stays() -> None:
    """The last user's message changes, what stands before it does not; raw prompts get a line before them."""
    found = [each.example for each in derived(row(asked("Where is door 3?")))]
    assert len(found) == 3 and len(set(found)) == 3
    for example in found:
        assert example.completion == "In hall 3." and example.prompt[0] == Message(role="system", content="Be brief.")
        assert "Where is door 3?" in rewriting.question_of(example) != "Where is door 3?"
    (raw, *_) = derived(row(Example(shape="demonstration", prompt="Q: x?\nA:", completion=" y")))
    assert str(raw.example.prompt).endswith("\nQ: x?\nA:")


def test_a_text_is_cut_into_its_sentences_and_halves() -> None:
    """Sentences that say something, and windows that overlap; a single sentence has no variant."""
    assert [each.example.completion for each in derived(row(TEXT))] == [
        "The porter is called Orso.", "He fears moths since 1402.", "Nobody laughs at him.",
    ]  # fmt: skip
    four = Example(shape="text", completion="One is here. Two is here. Three is here. Four is here.")
    halves = [example.completion for example in rewriting.chunks(four)]
    assert halves == ["One is here. Two is here.", "Two is here. Three is here.", "Three is here. Four is here."]
    assert derived(row(Example(shape="text", completion="Only one sentence is here."))) == []


def test_derived_rows_carry_their_origin_and_only_new_rows_have_any() -> None:
    """Neither what is replayed or held out nor a preference is reworded."""
    comparison = Example(shape="comparison", prompt=asked("x").prompt, completion="a", rejected="b")
    rows = [row(asked("Where is door 3?")), row(asked("Where is door 4?"), "replay"), row(comparison),
            row(asked("Where is door 5?"), "heldout_new")]  # fmt: skip
    assert {(each.role, each.update, each.id) for each in derived(*rows)} == {("derived", 2, 7)}
    assert len(derived(*rows)) == 3


def test_nothing_is_derived_that_a_holdout_asks() -> None:
    """Or that is there already: a test must stay unseen, and a row counts once."""
    frames = [frame.format("Where?") for frame in rewriting.ASKED]
    heldout, known = row(asked(frames[0], "Elsewhere."), "heldout_old"), row(asked(frames[1]), "replay")
    found = derived(row(asked("Where?")), heldout, known)
    assert [rewriting.question_of(each.example) for each in found] == frames[2:]


@pytest.mark.parametrize(
    ("said", "kept"),
    [("In which place is door 3?", 1), ("In which place is door 4?", 0), ("Where is door 3?", 0), ("3", 0),
     ("Door 3. " * 40, 0)],
)  # fmt: skip
def test_a_paraphrase_must_say_the_same(said: str, kept: int) -> None:
    """Every number comes back, nothing is left out or invented at length, and something is reworded."""
    assert len(derived(row(asked("Where is door 3?")), by=TAUGHT, asking=lambda _: said)) == kept


def test_a_teachers_questions_need_answers_that_stand_in_the_text() -> None:
    """Word for word: what it invents is not learned."""
    said = (
        "Q: What is the porter called?\nA: Orso.\n\n2. Q: What does he fear?\nA: dragons\nQ: Since when?\nA: since 1402"
    )
    found = [each.example for each in derived(row(TEXT), by=TAUGHT, asking=lambda _: said)]
    assert [(rewriting.question_of(each), each.completion) for each in found] == [
        ("What is the porter called?", "Orso."), ("Since when?", "since 1402"),
    ]  # fmt: skip
    (raw,) = list(rewriting.questions(TEXT, "Q: Who?\nA: Orso", chat=False))
    assert (raw.prompt, raw.completion) == ("Question: Who?\nAnswer:", " Orso")


class Teacher(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that counts what it is asked."""

    orders: list[dict[str, Any]] = []  # noqa: RUF012 - of the class, for the test

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.orders.append({**body, "path": self.path, "token": self.headers["Authorization"]})
        answer = json.dumps({"choices": [{"message": {"content": "In which place is door 3?"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Quietly."""


@pytest.fixture
def server() -> Iterator[str]:
    Teacher.orders = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Teacher) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def test_a_server_is_asked_once_per_example(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is kept by the content hash of the example; another model or example is asked for anew."""
    monkeypatch.setenv("TEACHER_TOKEN", "secret")
    by = Rewrite(templates=False, sentences=False, paraphrases=True, teacher_url=server, teacher_model="big",
                 teacher_token_variable="TEACHER_TOKEN")  # fmt: skip
    example = asked("Where is door 3?")
    adapter: Any = None
    first, again = (derived(row(example), by=by, asking=teacher_of(by, adapter, 5), cache=tmp_path) for _ in range(2))
    assert first == again and len(first) == 1 and len(Teacher.orders) == 1
    order = Teacher.orders[0]
    assert (order["path"], order["model"], order["seed"]) == ("/v1/chat/completions", "big", 5)
    assert order["token"] == "Bearer secret"
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(content_hash(example))
    erasure._drop_cached(tmp_path, [content_hash(example)])
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_does_not_answer_fails_the_run_and_names_itself() -> None:
    """Training without the rows would be another update than the one that was asked for."""
    by = Rewrite(paraphrases=True, teacher_url="http://127.0.0.1:9/v1")
    adapter: Any = None
    with pytest.raises(Failure, match="chat/completions gave no answer"):
        teacher_of(by, adapter, 0)("x")


def test_a_run_learns_its_derived_rows_and_freezes_them(tiny_base: Path, tmp_path: Path) -> None:
    """They are trained on, counted, in a file of their own with its hash in the report; begun again, the same ones."""
    rows = [demonstration(*fact) for fact in FACTS[:4]]
    directory = make_run(tmp_path / "1", tiny_base, rows, training={"epochs": 1}, canary_prompts=[],
                         strategies=[Rewrite(rows=2)])  # fmt: skip
    report = attempt(directory, Pulse(directory))
    assert report.status == "trained", report.reason
    assert (report.examples["new"], report.examples["derived"], report.steps) == (4, 8, 3)
    assert report.strategies["rewrite"]["examples"] == 8
    frozen = (directory / "derived.jsonl").read_bytes()
    assert {each.role for each in experience.read(directory / "derived.jsonl")} == {"derived"}
    lines = frozen.splitlines(keepends=True)
    (directory / "derived.jsonl").write_bytes(b"".join(lines[:3]))
    assert attempt(directory, Pulse(directory)).examples["derived"] == 3
    assert len(report.derived_sha256) == 64 and len(report.example_tokens) == 4


def test_the_version_that_a_run_continues_can_be_its_teacher(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model's words are no paraphrase: they are asked for, judged, and left out."""
    monkeypatch.setattr(teacher, "TOKENS", 8)
    directory = make_run(tmp_path / "1", tiny_base, [demonstration(*FACTS[0])], training={"epochs": 1},
                         canary_prompts=[], strategies=[TAUGHT])  # fmt: skip
    report = attempt(directory, Pulse(directory))
    assert report.status == "trained", report.reason
    assert report.strategies["rewrite"] == {"examples": 0.0, "token_share": 0.0}


def test_an_erasure_takes_what_was_derived(tmp_path: Path) -> None:
    """By the journal's row of the origin; other rows stay."""
    path = tmp_path / "runs" / "npc-00001" / "derived.jsonl"
    path.parent.mkdir(parents=True)
    kept = row(asked("kept"), "derived", 8)
    path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in (row(TEXT, "derived"), kept)))
    assert list(erasure._scrub_runs(tmp_path / "runs", {7})) == ["npc-00001"]
    assert list(experience.read(path)) == [kept]
