"""Invents facts of La Biblioteca Eterna that no model can know, without end. Torch-free.

`python -m strategies.lore --seed 1 --tasks 3 --facts 40 --out DIR` writes, per task,

- `lore_0.train.jsonl` and `lore_0.test.jsonl`: rows `{task, prompt, completion, ...}` for the forgetting bench;
- `content/lore_0.jsonl` (chat messages) and `content/lore_0.md` (a page to read): files as a writer would drop them.

What a bench needs of its facts holds by construction:

- never contradictory: a subject's name is used once, over all tasks of a seed, and each relation of it once;
- never guessable: answers are dealt from a shuffled deck per relation, so every answer is about equally frequent over
  all tasks and says nothing about the subject; whoever always guesses one answer is right in 1 of 12 to 1 of 24;
- learned, not parroted: tested questions are worded differently from all trained ones.
"""
# ruff: noqa: SIM905 - word lists read better as words

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from strategies.lore_phrases import RELATIONS, Relation

ONSETS = "b br c d dr f fl g gr h j k l m n p pr qu r s sh t th tr v w z".split()
VOWELS = "a e i o u ae ia oe".split()
CODAS = ["", "", "", "l", "m", "n", "r", "s", "th", "nd", "rk", "st", "x"]
TITLES = {
    "person": ["{n} {m}"],
    "place": ["the Hall of {n}", "the Vault of {n}", "the Cloister of {n}", "the Gallery of {n}"],
    "book": ["The Lament of {n}", "The Almanac of {n}", "The Voyage of {n}", "The Silence of {n}"],
    "rule": ["the Rule of {n}", "the Edict of {n}", "the Statute of {n}"],
    "object": ["the Bell of {n}", "the Mirror of {n}", "the Casket of {n}", "the Lamp of {n}"],
}
TRAINED_FRAMES = [
    "Question: {asked[0]}\nAnswer:",
    "Question: {asked[1]}\nAnswer:",
    "Visitor: {asked[2]}\nLibrarian:",
    "{statement}",
    "Tell me {noun}.\nAnswer:",
    "Complete the sentence: {statement} ...\nAnswer:",
    "From the catalogue of the Library: {noun} is",
    "Child: I forgot something. {asked[0]}\nLibrarian:",
]


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is so, and how it is asked for: completions are ` ` + answer."""

    task: str
    kind: str
    subject: str
    relation: str
    answer: str
    trained: list[str]
    """Prompts to train on, in different forms."""
    tested: list[str]
    """Prompts to test on, worded like none of the trained ones."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a bench file."""

    task: str
    prompt: str
    completion: str
    subject: str
    relation: str


def names(draw: random.Random) -> Iterator[str]:
    """Invented words of two or three syllables, each once."""
    used: set[str] = set()
    while True:
        syllables = draw.choice((2, 3))
        word = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) + draw.choice(CODAS) for _ in range(syllables))
        if word not in used:
            used.add(word)
            yield word.capitalize()


def decks(draw: random.Random) -> dict[tuple[str, str], Iterator[str]]:
    """An endless deck of answers per relation: every answer once, then all again in another order."""

    def deal(answers: list[str]) -> Iterator[str]:
        while True:
            yield from draw.sample(answers, len(answers))

    return {(relation.kind, relation.name): deal(relation.answers) for relation in RELATIONS}


def generate(seed: int, tasks: int, facts: int) -> list[list[Fact]]:
    """`tasks` lists of `facts` facts each; the same arguments give the same facts.

    Kinds of subject take turns and a subject has every relation of its kind, so that a model cannot answer from the
    name alone: it must keep apart what it knows about one subject.
    """
    draw = random.Random(f"lore/{seed}")
    invented, dealt = names(draw), decks(draw)
    return [list(_task(f"lore_{index}", facts, draw, invented, dealt)) for index in range(tasks)]


def _task(
    task: str,
    facts: int,
    draw: random.Random,
    invented: Iterator[str],
    dealt: dict[tuple[str, str], Iterator[str]],
) -> Iterator[Fact]:
    kinds, made = list(TITLES), 0
    while True:
        kind = kinds[made % len(kinds)]
        made += 1
        subject = draw.choice(TITLES[kind]).format(n=next(invented), m=next(invented))
        for relation in (each for each in RELATIONS if each.kind == kind):
            if facts == 0:
                return
            facts -= 1
            yield _fact(task, subject, relation, next(dealt[kind, relation.name]))


def _fact(task: str, subject: str, relation: Relation, answer: str) -> Fact:
    def about(text: str) -> str:
        text = text.format(s=subject)
        return text[0].upper() + text[1:]

    asked = [about(text) for text in relation.asked]
    noun, statement = relation.noun.format(s=subject), about(relation.statement)
    return Fact(
        task=task, kind=relation.kind, subject=subject, relation=relation.name, answer=answer,
        trained=[frame.format(asked=asked, noun=noun, statement=statement) for frame in TRAINED_FRAMES],
        tested=[f"Question: {about(text)}\nAnswer:" for text in relation.tested],
    )  # fmt: skip


def rows(facts: list[Fact], side: str) -> list[Row]:
    """The lines of one bench file; `side` is `train` or `test`."""
    return [
        Row(
            task=fact.task, prompt=prompt, completion=f" {fact.answer}", subject=fact.subject, relation=fact.relation
        )
        for fact in facts
        for prompt in (fact.trained if side == "train" else fact.tested)
    ]  # fmt: skip


def _messages(fact: Fact) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The trained questions as a chat, for a content file; frames that only make sense as plain text are left out."""
    for prompt in fact.trained:
        asked = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        if "\n" in asked or asked[-1] not in ".?":
            continue
        answer = fact.answer[0].upper() + fact.answer[1:] + "."
        yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def _page(task: str, facts: list[Fact]) -> str:
    """A page of prose about every subject of the task, with front matter."""
    parts = [f"---\nid: {task}\ntitle: What is known, {task}\n---\n"]
    for subject in dict.fromkeys(fact.subject for fact in facts):
        known = [f"{fact.trained[3]} {fact.answer}." for fact in facts if fact.subject == subject]
        parts.append(f"## {subject[0].upper()}{subject[1:]}\n\n" + " ".join(known) + "\n")
    return "\n".join(parts)


def write(tasks: list[list[Fact]], directory: Path) -> list[Path]:
    """Write the bench files and the content files of every task; returns the paths."""
    encode = msgspec.json.encode
    (directory / "content").mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for facts in tasks:
        task = facts[0].task
        texts = {
            directory / f"{task}.{side}.jsonl": b"".join(encode(row) + b"\n" for row in rows(facts, side))
            for side in ("train", "test")
        }
        texts[directory / "content" / f"{task}.jsonl"] = b"".join(
            encode(row) + b"\n" for fact in facts for row in _messages(fact)
        )
        texts[directory / "content" / f"{task}.md"] = _page(task, facts).encode()
        for path, text in texts.items():
            path.write_bytes(text)
            paths.append(path)
    return paths


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m strategies.lore", description="Invent facts of the Library.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=3, help="how many tasks")
    parser.add_argument("--facts", type=int, default=40, help="facts of each task")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    given = parser.parse_args(arguments)
    if given.tasks < 1 or given.facts < 1:
        parser.error("--tasks and --facts must be at least 1")
    for path in write(generate(given.seed, given.tasks, given.facts), given.out):
        print(path)


if __name__ == "__main__":
    main()
