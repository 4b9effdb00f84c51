"""Continuous batching: what runs beside a request never changes its answer."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving_kit import make_adapter

from serving.artifact import stage
from serving.engine import Engine, Options
from serving.model import ServedModel
from serving.refusal import Refusal
from serving.sampling import Sampling, Transcript, choose
from serving.scheduler import CHUNK_TOKENS, Generation, Piece
from serving.slots import BASE


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Float32, four rows, two adapters."""
    root = tmp_path_factory.mktemp("versions")
    engine = Engine(Options(base=tiny_base, adapter_root=root, dtype="float32", streams=4, context=500))
    for number in (1, 2):
        engine.load(f"v{number}", str(make_adapter(tiny_base, root / f"v{number}", seed=number, rank=2 + number)))
    yield engine
    engine.scheduler.stop(10)


class Caller:
    """Collects one request's pieces."""

    def __init__(self, engine: Engine, prompt: list[int], model: str, **sampling: object) -> None:
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        lease = engine.registry.lease(model)
        slot = -1 if lease.adapter is None else lease.adapter.slot
        options = Sampling(**{"max_tokens": 12, "temperature": 0, "logprobs": 0, "ignore_eos": True, **sampling})
        self.generation = Generation(
            prompt, options, slot, engine.model.tokenizer, self.take, lambda: engine.registry.release(lease)
        )
        engine.scheduler.submit(self.generation)

    def take(self, piece: Piece) -> None:
        """One more piece."""
        self.pieces.append(piece)
        if piece.is_last:
            self.done.set()

    def answer(self) -> tuple[list[int], list[float]]:
        """Tokens and their log-probabilities."""
        assert self.done.wait(30)
        assert self.pieces[-1].finish, self.pieces[-1]
        scored = [token for piece in self.pieces for token in piece.tokens]
        return [token.token for token in scored], [token.logprob for token in scored]


def requests() -> list[tuple[list[int], str, int]]:
    """(prompt, model, max_tokens): ragged lengths, one longer than a chunk, base and both adapters mixed."""
    lengths = [3, 17, CHUNK_TOKENS + 9, 40, 1, 120, 60, 8]
    models = ["base", "v1", "v2", "v1", "base", "v2", "base", "v1"]
    return [
        ([3 + (7 * at + number) % 250 for at in range(length)], model, 5 + 9 * number)
        for number, (length, model) in enumerate(zip(lengths, models, strict=True))
    ]


def test_together_equals_alone(engine: Engine) -> None:
    """Eight ragged requests on base and two adapters over four rows: the same tokens, log-probabilities to 1e-4."""
    alone = [Caller(engine, prompt, model, max_tokens=wanted).answer() for prompt, model, wanted in requests()]
    callers = [Caller(engine, prompt, model, max_tokens=wanted) for prompt, model, wanted in requests()]
    for caller, (tokens, logprobs) in zip(callers, alone, strict=True):
        together = caller.answer()
        assert together[0] == tokens
        assert together[1] == pytest.approx(logprobs, abs=1e-4)


def test_cached_decoding_equals_one_forward_pass(engine: Engine, tiny_base: Path) -> None:
    """Greedy tokens of the scheduler are those of transformers' own `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    prompt = [5 + at % 200 for at in range(CHUNK_TOKENS + 30)]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    assert Caller(engine, prompt, "base", max_tokens=20).answer()[0] == expected


def test_a_commit_beside_running_requests_changes_nothing_for_them(engine: Engine, tiny_base: Path) -> None:
    """While v1 answers, a third adapter is loaded and unloaded over and over: not one bit differs."""
    prompt = list(range(10, 40))
    expected = Caller(engine, prompt, "v1", max_tokens=300).answer()
    third = make_adapter(tiny_base, engine.options.adapter_root / "v3", seed=3, rank=16)
    caller = Caller(engine, prompt, "v1", max_tokens=300)
    commits = 0
    while not caller.done.is_set():
        engine.load("v3", str(third))
        engine.registry.unload("v3")
        commits += 1
    assert caller.answer() == expected
    assert commits > 3


def test_a_reused_row_and_slot_have_forgotten(engine: Engine, tiny_base: Path) -> None:
    """A slot that held rank 16 and then holds rank 2 answers as if it had been empty."""
    small = make_adapter(tiny_base, engine.options.adapter_root / "small", seed=5, rank=2)
    large = make_adapter(tiny_base, engine.options.adapter_root / "large", seed=6, rank=16)
    answers = []
    for _ in range(2):
        engine.load("small", str(small))
        answers.append(Caller(engine, [9, 8, 7], "small").answer())
        engine.registry.unload("small")
        engine.load("large", str(large))
        Caller(engine, list(range(60)), "large").answer()
        engine.registry.unload("large")
    assert answers[0] == answers[1]


def test_the_prompt_is_scored_in_chunks_as_in_one(engine: Engine) -> None:
    """Prompt log-probabilities across a chunk border are those of the tokens that were generated there."""
    prompt = [4 + at % 100 for at in range(CHUNK_TOKENS - 5)]
    tokens, logprobs = Caller(engine, prompt, "v2", max_tokens=10).answer()
    caller = Caller(engine, prompt + tokens, "v2", max_tokens=0, prompt_logprobs=True)
    caller.done.wait(30)
    scored = caller.pieces[0].prompt
    assert len(scored) == len(prompt) + 10 and scored[0].logprob is None
    assert [token.logprob for token in scored[-10:]] == pytest.approx(logprobs, abs=1e-4)


def test_a_failed_step_fails_its_requests_and_no_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the model is an error for those who run, and the engine goes on."""

    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "decode", explode)
        caller = Caller(engine, [5, 6], "v1")
        assert caller.done.wait(30)
        assert "out of memory" in (caller.pieces[-1].error or "")
    assert len(Caller(engine, [5, 6], "v1").answer()[0]) == 12


def test_nan_logits_fail_only_their_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with NaN is an error for its request; its neighbour in the batch is answered as ever."""
    tokens, logprobs = Caller(engine, [5, 6, 7], "base", max_tokens=30).answer()
    decode, poisoned_slot = engine.model.decode, engine.registry.lease("v1").adapter.slot

    def poison(tokens: list[int], positions: list[int], slots: list[int]) -> object:
        logits = decode(tokens, positions, slots)
        logits[[slot == poisoned_slot for slot in slots]] = float("nan")
        return logits

    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "decode", poison)
        neighbour, poisoned = Caller(engine, [5, 6, 7], "base", max_tokens=30), Caller(engine, [5, 6, 7], "v1")
        assert neighbour.answer() == (tokens, pytest.approx(logprobs, abs=1e-4))
        assert poisoned.done.wait(30)
    assert "NaN" in (poisoned.pieces[-1].error or "")


def test_sampling_by_nucleus_and_seed() -> None:
    """top_p keeps the smallest set that reaches p, top_k so many tokens; the same seed draws the same tokens."""
    import torch

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampling = Sampling(max_tokens=1, temperature=1.0, top_p=0.7)

    def draws(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, sampling, generator) for _ in range(200)]

    assert set(draws(1)) == {0, 1}
    assert draws(1) == draws(1) != draws(2)
    sampling = Sampling(max_tokens=1, top_k=3)
    assert set(draws(1)) == {0, 1, 2}
    sampling = Sampling(max_tokens=1, top_k=3, top_p=0.4)  # top_k first: 0.5 / 0.95 alone reaches it
    assert set(draws(1)) == {0}
    assert choose(logits, Sampling(max_tokens=1, temperature=0), None) == 0


def test_every_tensor_of_a_step_lies_where_the_model_does(tiny_base: Path, tmp_path: Path) -> None:
    """Device `meta` has no numbers, but refuses tensors of another device: what a GPU refuses is found without one.

    Prompts, decoding with mixed adapters, growth and moves of the cache, a commit.
    """
    model = ServedModel(tiny_base, slots=3, max_rank=16, rows=4, context=512, dtype="float32", device="meta")
    assert {each.device.type for each in [*model.model.parameters(), *model.model.buffers()]} == {"meta"}
    largest = model.bank.slot_bytes + (1 << 20)
    make_adapter(tiny_base, tmp_path / "v1", seed=1)
    staged = stage(tmp_path, "v1", 16, largest, model.bank.prepare)
    model.bank.commit(1, staged.tensors)
    for slot in (BASE, 1):
        assert model.read([5] * 300, 0, slot, every=True).shape == (300, model.vocabulary)
    model.cache.move(model.cache.reading, 2, 300)
    model.cache.clear(model.cache.reading, 300)
    logits = model.decode([4, 5, 6], [7, 300, 9], [BASE, 1, 2])
    assert logits.shape == (3, model.vocabulary) and logits.device.type == "meta"
    assert {layer.keys.device.type for layer in model.cache.layers} == {"meta"}
    model.cache.reset()


class Letters:
    """A tokenizer whose token n is the n-th of these byte strings."""

    PARTS = (b"a", b"b", b"\xc3", b"\xa9", b"END", b" ")

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Bytes joined, halves of characters replaced."""
        return b"".join(self.PARTS[token] for token in ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("tokens", "stop", "deltas", "rest"),
    [
        ([0, 2, 3, 1], (), ["a", "", "é", "b"], ""),
        ([0, 2], (), ["a", ""], "\ufffd"),
        ([0, 0, 1, 4], ("ab", "zz"), ["", "a", "", ""], ""),
        ([0, 5, 0], ("ab",), ["", "a ", ""], "a"),
        ([1, 4, 0], ("END",), ["b", "", ""], ""),
    ],
)
def test_text_becomes_certain_bit_by_bit(
    tokens: list[int], stop: tuple[str, ...], deltas: list[str], rest: str
) -> None:
    """Half characters wait for their other half, possible stop strings for their end."""
    transcript = Transcript(Letters(), stop)
    found = ["" if transcript.stopped else transcript.add(token) for token in tokens]
    assert (found, transcript.finish()) == (deltas, rest)


def test_a_stopping_engine_leaves_nobody_waiting(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running and waiting requests get an error, a commit that was not reached too, and newcomers a 503."""
    engine = Engine(Options(base=tiny_base, adapter_root=tmp_path, dtype="float32", streams=1))
    hold, entered, read = threading.Event(), threading.Event(), engine.model.read

    def slow_read(*arguments: object, **options: object) -> object:
        entered.set()
        hold.wait(30)
        return read(*arguments, **options)

    monkeypatch.setattr(engine.model, "read", slow_read)
    callers = [Caller(engine, [5, 6, 7], "base", max_tokens=400) for _ in range(3)]
    assert entered.wait(30)
    commit = engine.scheduler.between_steps(lambda: None)
    stopper = threading.Thread(target=engine.scheduler.stop, args=(30,))
    stopper.start()
    while not engine.scheduler.is_stopping:
        stopper.join(0.01)
    hold.set()
    stopper.join(30)
    assert not engine.scheduler.is_alive()
    for caller in callers:
        assert caller.done.wait(10)
        assert "shutting down" in (caller.pieces[-1].error or "")
    with pytest.raises(Refusal, match="shutting down"):
        commit.result(10)
    with pytest.raises(Refusal, match="shutting down"):
        engine.scheduler.between_steps(lambda: None)
    with pytest.raises(Refusal, match="shutting down"):
        Caller(engine, [5], "base")
