"""Continuous batching: one thread that reads prompts and decodes one token for every running request per step.

An adapter is committed by the same thread between two steps, so no forward pass ever sees half an adapter.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import torch

from serving.model import ServedModel
from serving.refusal import Refusal
from serving.sampling import Sampling, Scored, Transcript, choose, score

CHUNK_TOKENS = 256  # of a prompt per step: running requests wait no longer than this takes
log = logging.getLogger("serving")


class Piece(NamedTuple):
    """What one step gave to one request."""

    text: str = ""
    tokens: tuple[Scored, ...] = ()
    finish: str | None = None
    """`stop` or `length` with the last piece."""
    prompt: tuple[Scored, ...] = ()
    """The scored prompt, with the first piece, where asked for."""
    error: str | None = None
    """The request failed; nothing more comes."""

    @property
    def is_last(self) -> bool:
        """Nothing comes after it; row, lease and slot are free by the time it is handed over."""
        return self.finish is not None or self.error is not None


class Generation:
    """One request on its way through the scheduler."""

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        slot: int,
        tokenizer: object,
        emit: Callable[[Piece], None],
        end: Callable[[], None],
    ) -> None:
        """`emit` and `end` are called from the model's thread; `end` once, when the slot is no longer used."""
        self.prompt, self.sampling, self.slot, self.emit, self.end = prompt, sampling, slot, emit, end
        self.transcript = Transcript(tokenizer, sampling.stop)
        self.generator: torch.Generator | None = None
        if sampling.temperature > 0 and sampling.seed is not None:
            self.generator = torch.Generator().manual_seed(sampling.seed)
        self.read = 0  # prompt tokens in the cache
        self.scored: list[Scored] = []
        self.last = 0  # the token that the next step feeds
        self.produced = 0
        self.cancelled = False

    @property
    def length(self) -> int:
        """Tokens of this request in the cache."""
        return self.read + max(self.produced - 1, 0)


class Scheduler:
    """Owns the model's thread. Every public method may be called from any other thread."""

    def __init__(self, model: ServedModel, *, max_waiting: int, threads: int) -> None:
        self._model, self._max_waiting, self._threads = model, max_waiting, threads
        self._condition = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._between: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._reading: Generation | None = None
        self._running: list[Generation] = []  # index = row of the cache
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Queue a request; `Refusal` 429 when the queue is full, 503 when the server is going down."""
        with self._condition:
            if self._stopping:
                raise Refusal(503, "the server is shutting down", retry_after=5)
            if len(self._waiting) >= self._max_waiting:
                raise Refusal(429, f"{self._max_waiting} requests are waiting already", retry_after=1)
            self._waiting.append(generation)
            self._condition.notify()

    def cancel(self, generation: Generation) -> None:
        """The client is gone: free its row at the next step. Its last piece may or may not still come."""
        generation.cancelled = True
        with self._condition:
            self._condition.notify()

    def between_steps(self, work: Callable[[], None]) -> Future[None]:
        """Run `work` on the model's thread while no forward pass runs."""
        future: Future[None] = Future()
        with self._condition:
            if self._stopping:
                raise Refusal(503, "the server is shutting down", retry_after=5)
            self._between.append((work, future))
            self._condition.notify()
        return future

    def load(self) -> tuple[int, int]:
        """(running, waiting) requests."""
        with self._condition:
            return len(self._running) + (self._reading is not None), len(self._waiting)

    def is_alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called: nothing new is taken."""
        return self._stopping

    def stop(self, timeout_seconds: float) -> None:
        """End the thread after the current step; requests still on their way get an error."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout_seconds)

    @torch.inference_mode()
    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        while self._wait():
            self._run_between()
            try:
                self._step()
            except Exception as error:
                log.exception("a step failed; its requests are lost")
                self._fail_all(f"the engine failed: {error}")
        self._fail_all("the server is shutting down")
        while self._between:  # whoever waits for a commit must not wait for ever
            self._between.popleft()[1].set_exception(Refusal(503, "the server is shutting down", retry_after=5))

    def _wait(self) -> bool:
        with self._condition:
            while not (self._stopping or self._between or self._waiting or self._reading or self._running):
                self._condition.wait()
            return not self._stopping

    def _run_between(self) -> None:
        while self._between:
            work, future = self._between.popleft()
            try:
                work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _step(self) -> None:
        self._drop_cancelled()
        if self._reading is None and len(self._running) < self._model.rows:
            with self._condition:
                self._reading = self._waiting.popleft() if self._waiting else None
        if self._reading is not None:
            self._read_chunk(self._reading)
        if self._running:
            self._decode()

    def _drop_cancelled(self) -> None:
        with self._condition:
            gone = [g for g in self._waiting if g.cancelled]
            self._waiting = deque(g for g in self._waiting if not g.cancelled)
        for generation in gone:
            generation.end()
        if self._reading is not None and self._reading.cancelled:
            self._stop_reading(self._reading)
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._leave(row)

    def _read_chunk(self, generation: Generation) -> None:
        """Read the next part of a prompt; after the last one the request has its first token and joins the batch."""
        start = generation.read
        part = generation.prompt[start : start + CHUNK_TOKENS]
        every = generation.sampling.prompt_logprobs
        logits = self._model.read(part, start, generation.slot, every=every)
        generation.read += len(part)
        if every:
            following = generation.prompt[start + 1 : start + len(part) + 1]
            if start == 0:
                generation.scored.append(Scored(generation.prompt[0]))  # nothing predicts the first token
            generation.scored += score(logits[: len(following)], following, generation.sampling.logprobs or 0)
        if generation.read == len(generation.prompt):
            self._join(generation, logits[-1:])

    def _join(self, generation: Generation, logits: torch.Tensor) -> None:
        if generation.sampling.max_tokens == 0:
            piece = Piece(finish="length", prompt=tuple(generation.scored))
        else:
            piece = self._advance(generation, logits, tuple(generation.scored))
        if piece.is_last:
            self._stop_reading(generation)
        else:
            cache = self._model.cache
            cache.move(cache.reading, len(self._running), generation.read)
            cache.clear(cache.reading, generation.read)
            self._running.append(generation)
            self._reading = None
        generation.emit(piece)

    def _decode(self) -> None:
        running = self._running
        logits = self._model.decode(
            [g.last for g in running], [g.read + g.produced - 1 for g in running], [g.slot for g in running]
        )
        for row in reversed(range(len(running))):
            generation = running[row]
            piece = self._advance(generation, logits[row : row + 1], ())
            if piece.is_last:
                self._leave(row)
            generation.emit(piece)

    def _advance(self, generation: Generation, logits: torch.Tensor, prompt: tuple[Scored, ...]) -> Piece:
        """A request's next token, from logits (1, vocabulary)."""
        if not bool(torch.isfinite(logits).all()):
            return Piece(error="the model gave NaN or infinite logits")
        sampling = generation.sampling
        token = choose(logits[0], sampling, generation.generator)
        generation.last, generation.produced = token, generation.produced + 1
        top = sampling.logprobs
        scored = Scored(token) if top is None else score(logits, [token], top)[0]
        is_eos = token in self._model.eos and not sampling.ignore_eos
        text = "" if is_eos else generation.transcript.add(token)
        finish = self._finish(generation, is_eos)
        if finish is not None:
            text += generation.transcript.finish()
        return Piece(text=text, tokens=(scored,), finish=finish, prompt=prompt)

    def _finish(self, generation: Generation, is_eos: bool) -> str | None:
        if is_eos or generation.transcript.stopped:
            return "stop"
        if generation.produced >= generation.sampling.max_tokens:
            return "length"
        return None

    def _leave(self, row: int) -> None:
        """Free a row; the last row takes its place, so that the batch stays rows 0..n-1."""
        cache, running, last = self._model.cache, self._running, len(self._running) - 1
        leaving, mover = running[row], running[last]
        cache.clear(row, leaving.length)
        if row != last:
            cache.move(last, row, mover.length)
            cache.clear(last, mover.length)
            running[row] = mover
        running.pop()
        leaving.end()

    def _stop_reading(self, generation: Generation) -> None:
        self._reading = None
        self._model.cache.clear(self._model.cache.reading, generation.read)
        generation.end()

    def _fail_all(self, message: str) -> None:
        """Every running request fails (when stopping: the waiting ones too), and the cache starts empty again."""
        with self._condition:
            waiting, reading = self._waiting if self._stopping else deque(), self._reading
            lost = [*self._running, *([reading] if reading else []), *waiting]
            waiting.clear()
            self._running, self._reading = [], None
        self._model.cache.reset()
        for generation in lost:
            generation.end()
            generation.emit(Piece(error=message))
