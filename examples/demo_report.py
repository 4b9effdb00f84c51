"""What the demo found, as tables for people, and which promises were not kept."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_client import Question, Reply, Traffic
from rich.console import Console
from rich.table import Table

KNOWN_AFTER, FIRST_STILL_KNOWN = 0.8, 0.7


@dataclass
class Lesson:
    """One drop: what was asked, what was answered before and after each update since, and the run that it led to."""

    name: str
    questions: list[Question]
    before: list[Reply]
    seconds: float
    """From the drop to the new version answering."""
    run: dict[str, Any]
    """Its row of `eternad history --json`."""
    after: list[list[Reply]] = field(default_factory=list)
    """Replies after its own update, after the next one, ..."""


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo found."""

    lessons: list[Lesson]
    traffic: Traffic
    versions: list[dict[str, Any]]
    """`eternad versions --json`."""


def share(replies: list[Reply]) -> float:
    """Share of right answers."""
    return sum(reply.is_right for reply in replies) / len(replies)


def learned(lesson: Lesson) -> float:
    """Share of right answers after the update among the questions that were answered wrongly before it."""
    new = [after for before, after in zip(lesson.before, lesson.after[0], strict=True) if not before.is_right]
    return share(new) if new else 0.0


def broken_promises(outcome: Outcome, learning: bool) -> list[str]:
    """One sentence for each promise that was not kept; without `learning` only those about requests."""
    traffic, broken = outcome.traffic, []
    if traffic.failed:
        broken.append(f"{len(traffic.failed)} requests failed, the first with: {traffic.failed[0]}")
    if traffic.mixed:
        broken.append(f"{len(traffic.mixed)} answers came from more than one version: {traffic.mixed[0]}")
    if not learning:
        return broken
    broken += [
        f"{lesson.name}: {learned(lesson):.0%} of what was new is known, promised {KNOWN_AFTER:.0%}"
        for lesson in outcome.lessons
        if learned(lesson) < KNOWN_AFTER
    ]
    still = share(outcome.lessons[0].after[-1])
    if still < FIRST_STILL_KNOWN:
        broken.append(f"{still:.0%} of the first drop is still known, promised {FIRST_STILL_KNOWN:.0%}")
    return broken


def show(outcome: Outcome, directory: Path, seconds: float, console: Console) -> None:
    """Print the tables and what to try next."""
    for table in (answers_table(outcome), knowledge_table(outcome), updates_table(outcome)):
        console.print()
        console.print(table)
    console.print()
    console.print(traffic_line(outcome.traffic))
    console.print(f"{seconds / 60:.1f} minutes in all.\n")
    console.print(next_steps(directory), soft_wrap=True)


def answers_table(outcome: Outcome) -> Table:
    """Two questions of every drop with the answers before and after its update."""
    table = Table(title="What Quill said (no question is worded as in the files)", title_justify="left")
    for column in ("question", "before", "after its update", "after the last update"):
        table.add_column(column)
    for lesson in outcome.lessons:
        for index in (0, len(lesson.questions) // 2):
            replies = (lesson.before[index], lesson.after[0][index], lesson.after[-1][index])
            table.add_row(lesson.questions[index].text, *(_said(reply) for reply in replies))
        table.add_section()
    return table


def _said(reply: Reply) -> str:
    text = " ".join(reply.text.split())
    colour = "green" if reply.is_right else "red"
    return f"[{colour}]{text.replace('[', '(').replace(']', ')')}[/{colour}]"


def knowledge_table(outcome: Outcome) -> Table:
    """Share of right answers, drop by drop, before its update and after each update since."""
    table = Table(title="Questions answered right", title_justify="left")
    table.add_column("dropped file", no_wrap=True)
    table.add_column("questions", justify="right")
    table.add_column("before", justify="right")
    for number in range(1, len(outcome.lessons) + 1):
        table.add_column(f"after update {number}", justify="right")
    for number, lesson in enumerate(outcome.lessons):
        shares = [f"{share(replies):.0%}" for replies in lesson.after]
        cells = [""] * number + [f"[bold]{shares[0]}[/bold]", *shares[1:]]
        table.add_row(lesson.name, str(len(lesson.questions)), f"{share(lesson.before):.0%}", *cells)
    return table


def updates_table(outcome: Outcome) -> Table:
    """What each update took, what the gate measured, and how long the swap was."""
    table = Table(title="Updates", title_justify="left")
    for column in ("version", "new", "replayed", "drop to live", "gain (nats)", "old loss", "drift", "swap (flip)"):
        table.add_column(column, justify="right", no_wrap=True)
    for lesson in outcome.lessons:
        rows = (lesson.run.get("cut") or {}).get("rows", {})
        checks = {check["name"]: check["value"] for check in (lesson.run.get("verdict") or {}).get("checks", [])}
        table.add_row(
            str(lesson.run["version"]), str(rows.get("new", 0)), str(rows.get("replay", 0)), f"{lesson.seconds:.0f} s",
            *(_number(checks.get(name)) for name in ("new_gain", "old_loss", "drift_base")),
            swap_time(outcome.versions, lesson.run["version"]),
        )  # fmt: skip
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def swap_time(versions: list[dict[str, Any]], number: int) -> str:
    """From a version on disk to one that is proved and answers under the model's name; in brackets the flip alone."""
    activation = next((version["activation"] for version in versions if version["number"] == number), None)
    return f"{activation['total_ms']:.0f} ms ({activation['flip_ms']:.2f} ms)" if activation else "-"


def traffic_line(traffic: Traffic) -> str:
    """The guest who never stopped talking, in one paragraph."""
    total = sum(traffic.answers.values()) + len(traffic.failed) + len(traffic.mixed)
    by_version = ", ".join(f"{number} by {version}" for version, number in traffic.answers.items())
    colour = "red" if traffic.failed or traffic.mixed else "green"
    return (
        f"Meanwhile a visitor streamed {total} answers: [{colour}]{len(traffic.failed)} failed,"
        f" {len(traffic.mixed)} came from more than one version[/{colour}] ({by_version});"
        f" the slowest took {traffic.slowest_seconds:.1f} s."
    )


def next_steps(directory: Path) -> str:
    """What to try now."""
    eternad = f"eternad --config {directory}/eternad.toml"
    return (
        "Everything is still there; look around:\n"
        f"  {eternad} history npc     # every run, and why\n"
        f"  {eternad} show npc@3      # what the gate measured\n"
        f"  {eternad} log             # every step, in a chain of hashes\n"
        "or start both again, and drop a file of your own:\n"
        f"  {eternad} serve hall &\n"
        f"  {eternad} run &\n"
        f"  cp FILE.md {directory}/library/content/npc/\n"
        f"  {eternad} ask npc 'What have you learned?'"
    )
