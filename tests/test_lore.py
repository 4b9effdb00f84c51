"""The lore generator: what a forgetting bench must be able to rely on."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from strategies.lore import TITLES, Fact, generate, main, rows
from strategies.lore_phrases import RELATIONS


@pytest.fixture(scope="module")
def tasks() -> list[list[Fact]]:
    """Six tasks of 80 facts."""
    return generate(seed=7, tasks=6, facts=80)


@pytest.fixture(scope="module")
def facts(tasks: list[list[Fact]]) -> list[Fact]:
    """All 480 facts of the six tasks."""
    return [fact for task in tasks for fact in task]


def test_same_seed_gives_the_same_facts_and_another_seed_gives_others() -> None:
    """A bench can be repeated, and its seeds are independent."""
    assert generate(3, 2, 9) == generate(3, 2, 9)
    subjects = [{fact.subject for task in generate(seed, 2, 20) for fact in task} for seed in (3, 4)]
    assert not subjects[0] & subjects[1]


def test_more_tasks_leave_the_first_ones_as_they_were() -> None:
    """A longer sequence begins like the shorter one."""
    assert generate(3, 4, 9)[:2] == generate(3, 2, 9)


def test_tasks_have_as_many_facts_as_asked_for(tasks: list[list[Fact]]) -> None:
    """Every task has its size, and its name on every fact."""
    assert [len(task) for task in tasks] == [80] * 6
    assert [{fact.task for fact in task} for task in tasks] == [{f"lore_{index}"} for index in range(6)]


def test_no_two_facts_contradict_each_other(facts: list[Fact]) -> None:
    """A relation of a subject is told once, and no subject lives in two tasks."""
    assert max(Counter((fact.subject, fact.relation) for fact in facts).values()) == 1
    homes = Counter(subject for subject, _ in {(fact.subject, fact.task) for fact in facts})
    assert max(homes.values()) == 1


def test_no_question_is_asked_twice_with_different_answers(facts: list[Fact]) -> None:
    """Each prompt, trained or tested, has one answer."""
    answers: dict[str, set[str]] = {}
    for fact in facts:
        for prompt in fact.trained + fact.tested:
            answers.setdefault(prompt, set()).add(fact.answer)
    assert max(map(len, answers.values())) == 1


def test_every_fact_has_its_phrasings_and_tests_are_worded_differently(facts: list[Fact]) -> None:
    """6 to 10 different prompts are trained, 2 or 3 are tested, and none is both."""
    for fact in facts:
        assert 6 <= len(set(fact.trained)) == len(fact.trained) <= 10
        assert 2 <= len(set(fact.tested)) <= 3
        assert not set(fact.tested) & set(fact.trained)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: f"{relation.kind}-{relation.name}")
def test_tested_wordings_are_nowhere_inside_the_trained_ones(relation: object) -> None:
    """Neither a tested question nor the part of it behind the subject is trained on word for word."""
    trained = " | ".join([*relation.asked, relation.statement, relation.noun]).lower()  # type: ignore[attr-defined]
    for question in relation.tested:  # type: ignore[attr-defined]
        assert question.lower() not in trained
        assert "{s}" in question


def test_answers_are_short_and_never_in_the_question(facts: list[Fact]) -> None:
    """One to four words, and reading the question does not help."""
    for fact in facts:
        assert 1 <= len(fact.answer.split()) <= 4
        words = fact.answer.removeprefix("the ").lower()
        assert not any(f" {words} " in f" {prompt.lower()} " for prompt in fact.trained + fact.tested)


def test_answers_are_balanced(facts: list[Fact]) -> None:
    """Within a relation no answer is more than one time more frequent than another: guessing does not pay."""
    for relation in RELATIONS:
        key = (relation.kind, relation.name)
        dealt = Counter(fact.answer for fact in facts if (fact.kind, fact.relation) == key)
        frequent = [dealt[answer] for answer in relation.answers]
        assert max(frequent) - min(frequent) <= 1
        assert len(set(relation.answers)) == len(relation.answers) >= 12


def test_kinds_of_subject_are_balanced(facts: list[Fact]) -> None:
    """People, places, books, rules and objects have the same number of facts."""
    assert Counter(fact.kind for fact in facts) == dict.fromkeys(TITLES, 96)


def test_completions_begin_with_a_space_and_prompts_do_not_end_with_one(facts: list[Fact]) -> None:
    """Prompt + completion tokenises like running text."""
    for side in ("train", "test"):
        for row in rows(facts, side):
            assert row.completion == f" {row.completion.strip()}"
            assert row.prompt == row.prompt.strip()


def test_command_writes_bench_and_content_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file is listed and can be read: rows of the bench, chats, and a page that tells every fact."""
    main(["--seed", "5", "--tasks", "2", "--facts", "12", "--out", str(tmp_path)])
    listed = {Path(line) for line in capsys.readouterr().out.split("\n") if line}
    assert listed == {path for path in tmp_path.rglob("*") if path.is_file()} and len(listed) == 8
    facts = generate(5, 2, 12)[1]
    train = [json.loads(line) for line in (tmp_path / "lore_1.train.jsonl").read_text().splitlines()]
    assert len(train) == 12 * len(facts[0].trained)
    assert set(train[0]) == {"task", "prompt", "completion", "subject", "relation"}
    chats = [json.loads(line) for line in (tmp_path / "content" / "lore_1.jsonl").read_text().splitlines()]
    assert all([message["role"] for message in chat["messages"]] == ["user", "assistant"] for chat in chats)
    assert len(chats) >= 3 * 12
    page = (tmp_path / "content" / "lore_1.md").read_text()
    assert all(f"{fact.trained[3]} {fact.answer}." in page for fact in facts)


def test_command_refuses_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No task or no fact is an error that says so."""
    with pytest.raises(SystemExit):
        main(["--facts", "0", "--out", str(tmp_path)])
    assert "at least 1" in capsys.readouterr().err


def test_generator_needs_no_torch() -> None:
    """The daemon and the CLI may import it."""
    code = "import sys, strategies.lore; sys.exit(any(n in sys.modules for n in ('torch', 'transformers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
