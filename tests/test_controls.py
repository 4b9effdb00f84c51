"""The bench of controls against overfitting: its teacher, what it shows, its cells and its table."""

from pathlib import Path

import httpx
import pytest

from bench import chain, controls
from bench.controls import CONTROLS, Control, task_of
from bench.controls_report import Cell, text_of
from bench.scoring import TaskRow
from bench.teacher import answer, teaching
from buffers.example import Example
from strategies.catalog import Rewrite
from strategies.lore import generate
from strategies.rewriting import paraphrase_order, paraphrases, questions, questions_order

FACTS = generate(5, 1, 6)[0]


def test_the_teacher_is_always_right() -> None:
    """What it says passes the checks of `rewrite`: another trained wording, and answers that stand in the text."""
    row = TaskRow(FACTS[0].trained[0], f" {FACTS[0].answer}").example
    (reworded,) = paraphrases(row, answer(FACTS, paraphrase_order(row)))
    assert reworded.prompt == FACTS[0].trained[1] and reworded.completion == row.completion
    text = task_of(FACTS, prose=True).train[0].example
    asked = list(questions(text, answer(FACTS, questions_order(text, 2)), chat=False))
    known = [fact for fact in FACTS if fact.subject == FACTS[0].subject]
    assert [found.completion for found in asked] == [f" {fact.answer}" for fact in known]
    assert [found.prompt for found in asked] == [fact.trained[0] for fact in known]


def test_the_teacher_speaks_the_protocol() -> None:
    """A chat completion over HTTP, gone afterwards."""
    body = {"model": "", "messages": [{"role": "user", "content": paraphrase_order(Example(
        shape="demonstration", prompt=FACTS[1].trained[0], completion="-"))}]}  # fmt: skip
    with teaching(FACTS) as url:
        said = httpx.post(f"{url}/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert said == FACTS[1].trained[1]
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{url}/chat/completions", json=body)


def test_what_is_asked_was_never_trained() -> None:
    """One wording of every fact, or a text about each subject; all tests in other words."""
    for prose in (False, True):
        task = task_of(FACTS, prose=prose)
        assert not {row.prompt for row in task.train} & {row.prompt for row in task.test}
        shown = " ".join(row.prompt + row.completion for row in task.train)
        assert all(fact.answer in shown for fact in FACTS)
        assert {row.example.shape for row in task.train} == {"text" if prose else "demonstration"}


def test_every_control_shows_as_many_rows() -> None:
    """Rows that become several are shown in fewer epochs, but for a control whose name says how many it has."""
    assert [name for name in CONTROLS if name.endswith("epochs")] == ["prose, 8 questions, 12 epochs"]
    for control in [control for name, control in CONTROLS.items() if not name.endswith("epochs")]:
        rewriting = [each for each in control.strategies if isinstance(each, Rewrite)]
        assert control.wordings == 1 + sum(each.rows for each in rewriting)
        assert controls.EPOCHS % control.wordings == 0


def test_the_table_has_a_line_per_control() -> None:
    """The mean with the smallest and the largest of the seeds."""
    cells = [Cell(control="x", seed=seed, setting="", recall=seed / 4, loss_asked=1.0) for seed in (1, 2)]
    (line,) = (line for line in text_of(cells, 6, 12).splitlines() if line.startswith("| x |"))
    assert line.startswith("| x | 37.5 [25.0, 50.0] | 1.00 [1.00, 1.00] |")


@pytest.mark.slow
def test_a_cell_is_measured_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the trainer with the teacher; a second call trains nothing and writes the same page."""
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "a.txt").write_text("Water is wet.\n\nRain falls.\n", "utf-8")
    taught = CONTROLS["`rewrite` paraphrases"]
    monkeypatch.setattr(controls, "CONTROLS", {"plain": Control(), "taught": taught})
    places = [f"--{name}={tmp_path / name}" for name in ("work", "docs", "general")]
    arguments = [*places, f"--base={tiny_base}", "--facts=4", "--seeds=0"]
    assert controls.main(arguments) == 0
    page = (tmp_path / "docs" / "controls.md").read_text("utf-8")
    assert "| plain |" in page and "| taught |" in page
    assert "epochs 12.0" in (said := capsys.readouterr().out) and "epochs 6.0" in said
    monkeypatch.setattr(chain, "train", lambda _: pytest.fail("a finished cell was trained again"))
    assert controls.main(arguments) == 0
    assert (tmp_path / "docs" / "controls.md").read_text("utf-8") == page
