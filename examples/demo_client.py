"""The demo's guests: one who asks the questions, and one who never stops talking while versions are swapped."""

import json
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from openai import OpenAI

SMALL_TALK = (
    "Good evening. May I come in?",
    "Who are you?",
    "What is the weather like on the marsh?",
    "Tell me a very short story.",
    "How do I borrow a book?",
)
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Question:
    """A question whose wording is in no dropped file, and what counts as an answer."""

    text: str
    accepted: list[str]

    def is_answered_by(self, answer: str) -> bool:
        """Whether one of the accepted answers stands in it, as whole words."""
        return any(re.search(rf"\b{re.escape(each)}\b", answer, re.IGNORECASE) for each in self.accepted)


@dataclass(frozen=True)
class Reply:
    """What the model said, and which version said it."""

    question: Question
    text: str
    version: str

    @property
    def is_right(self) -> bool:
        """Whether it answers the question."""
        return self.question.is_answered_by(self.text)


def questions_of(path: Path) -> list[Question]:
    """The lines of a questions file."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [Question(text=row["question"], accepted=row["accepted"]) for row in rows]


def connect(port: int) -> OpenAI:
    """A client that hides nothing: no retries."""
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)


def ask_all(client: OpenAI, model: str, questions: list[Question], together: int = 4) -> list[Reply]:
    """Ask every question in a conversation of its own, a few at a time."""

    def ask(question: Question) -> Reply:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question.text}], max_tokens=ANSWER_TOKENS, temperature=0
        )
        return Reply(question=question, text=(answer.choices[0].message.content or "").strip(), version=answer.model)

    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(ask, questions))


@dataclass
class Traffic:
    """What happened to the requests of the guest who never stops talking."""

    answers: Counter[str] = field(default_factory=Counter)
    """Complete answers, by the version that every chunk of them named."""
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    """Answers whose chunks did not all name one and the same version."""
    slowest_seconds: float = 0.0


class Visitor:
    """Streams one answer after the other, all the time, in a thread."""

    def __init__(self, port: int, model: str, pause_seconds: float = 0.3) -> None:
        self._client, self._model, self._pause = connect(port), model, pause_seconds
        self._traffic, self._enough = Traffic(), threading.Event()
        self._thread = threading.Thread(target=self._talk, name="visitor")

    def __enter__(self) -> "Visitor":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> Traffic:
        """Finish the sentence and go; may be called twice."""
        self._enough.set()
        self._thread.join()
        return self._traffic

    def _talk(self) -> None:
        said = 0
        while not self._enough.wait(self._pause):
            started = time.monotonic()
            try:
                self._listen(SMALL_TALK[said % len(SMALL_TALK)])
            except Exception as error:  # whatever goes wrong is what this guest is here to count
                self._traffic.failed.append(f"{type(error).__name__}: {error}")
            self._traffic.slowest_seconds = max(self._traffic.slowest_seconds, time.monotonic() - started)
            said += 1

    def _listen(self, text: str) -> None:
        stream: Any = self._client.chat.completions.create(
            model=self._model, messages=[{"role": "user", "content": text}], max_tokens=24, stream=True
        )
        chunks = list(stream)
        versions = {chunk.model for chunk in chunks}
        if not chunks or chunks[-1].choices[0].finish_reason is None:
            self._traffic.failed.append(f"the stream broke off after {len(chunks)} chunks")
        elif len(versions) != 1:
            self._traffic.mixed.append(" and ".join(sorted(versions)))
        else:
            self._traffic.answers[versions.pop()] += 1
