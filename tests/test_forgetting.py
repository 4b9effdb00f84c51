"""The forgetting bench: scores by one forward pass, cells that are kept, and the page it writes."""

import hashlib
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
import torch

from bench import chain, forgetting
from bench.chain import Setting
from bench.forgetting import tasks_of
from bench.forgetting_report import Cell, Cost, growth, write_report
from bench.pictures import curves, heat_maps
from bench.scoring import Task, TaskRow, chosen, drift, read_task, recalled, task_score
from buffers import experience
from buffers.experience import Row, general_rows
from daemon import cli
from strategies.adapter import Adapter, load_adapter
from strategies.catalog import Distill, Replay
from strategies.general import kept_or_written
from strategies.request import Lora

SVG = "{http://www.w3.org/2000/svg}"
PROMPT = "Question: what does the porter fear?\nAnswer:"


@pytest.fixture(scope="module")
def adapter(tiny_base: Path) -> Adapter:
    """A tiny model with a fresh adapter."""
    return load_adapter(tiny_base, Lora(rank=4, alpha=8.0))


@torch.no_grad()
def continuation(adapter: Adapter, prompt: str, tokens: int) -> str:
    """What the model itself would say, token by token."""
    ids = list(adapter.tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(adapter.head.logits(adapter.hidden(torch.tensor([ids]))[-1:]).argmax()))
    return str(adapter.tokenizer.decode(ids[start:]))


def test_recall_asks_for_every_token_of_the_answer(adapter: Adapter) -> None:
    """The model's own greedy answer is right; with another last letter it is wrong, whatever stands beside it."""
    said = next(
        text for prompt in "abcdefgh" if (text := continuation(adapter, prompt, 3)).isascii() and text.isalnum()
    )
    prompt = next(prompt for prompt in "abcdefgh" if continuation(adapter, prompt, 3) == said)
    rows = [TaskRow(prompt, said), TaskRow(PROMPT, " moths and a long answer"), TaskRow(prompt, said[:-1] + "~")]
    assert recalled(adapter, rows) == [True, False, False]


def test_choice_compares_the_options_alone(adapter: Adapter) -> None:
    """Exactly one of the options is right, although hardly any is the most likely token of all."""
    options = ("Good", "Bad", "Odd")
    rows = [TaskRow(PROMPT, f" {option}", options) for option in options]
    # a byte-level tokenizer gives all of them the same first token, the space
    with pytest.raises(ValueError, match="share a first token"):
        chosen(adapter, rows)


def test_choice_takes_the_likeliest_first_token(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """With options that differ from the first token on, one and only one of them wins."""
    monkeypatch.setattr(
        "bench.scoring._first_tokens", lambda row, _: [adapter.tokenizer(o)["input_ids"][0] for o in "abc"]
    )
    rows = [TaskRow(PROMPT, option, ("a", "b", "c")) for option in "abc"]
    assert sum(chosen(adapter, rows)) == 1


def test_drift_of_the_base_is_zero_and_of_a_moved_adapter_is_not(adapter: Adapter) -> None:
    """KL(base || model) is that of two distributions, not of two files."""
    texts = ["Water boils sooner on a mountain.", "Bees carry pollen."]
    assert drift(adapter, texts).kl == pytest.approx(0.0, abs=1e-6)
    with adapter.holding(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)) * 0.3):
        assert drift(adapter, texts).kl > 1e-3


def test_tasks_are_read_from_files(tmp_path: Path) -> None:
    """Train and test rows with their options."""
    line = '{"task": "t", "prompt": "p", "completion": " a", "options": ["a", "b"]}\n'
    for side in ("train", "test"):
        (tmp_path / f"t.{side}.jsonl").write_text(line * 2, "utf-8")
    task = read_task(tmp_path, "t")
    assert task.has_options and len(task.train) == 2 and task.test[0].options == ("a", "b")


def test_presentations_decide_the_epochs_of_facts() -> None:
    """Few facts are shown more often; classification has a number of epochs of its own."""
    setting = Setting(base=Path(), work=Path(), fact_presentations=960, option_epochs=2, option_rows=3)
    facts = Task("facts", [TaskRow("p", " a")] * 120, [TaskRow("q", " a")])
    topics = Task("topics", [TaskRow("p", " a", ("a", "b"))] * 9, [TaskRow("q", " a", ("a", "b"))])
    assert setting.epochs(facts) == 8 and setting.epochs(topics) == 2
    assert len(setting.limited(topics).train) == 3 and len(setting.limited(facts).train) == 120


@pytest.fixture
def bench(tmp_path: Path, tiny_base: Path) -> Callable[..., int]:
    """The command line on two tiny tasks of lore."""
    (tmp_path / "general").mkdir()
    for name in ("anchors", "probes"):
        (tmp_path / "general" / f"{name}.txt").write_text(f"The {name} are here.\n\nWater is wet.\n", "utf-8")
    places = {name: str(tmp_path / name) for name in ("work", "docs", "general")}

    def run(*arguments: str) -> int:
        fixed = [f"--{name}={place}" for name, place in places.items()]
        return forgetting.main([*fixed, f"--base={tiny_base}", "--lore=2,2", "--rank=4", "--test-rows=4", *arguments])

    return run


def stop() -> None:
    raise forgetting.OutOfTime


@pytest.mark.slow
def test_bench_measures_every_cell_once_and_writes_the_page(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base row, one row per update, drift; a second call trains nothing; the page has a line per strategy."""
    monkeypatch.setattr(Setting, "epochs", lambda *_: 1)
    recipe = tmp_path / "recipes.toml"
    recipe.write_text("gentle = [{name = 'replay', ratio = 0.5, general_ratio = 0.1}, {name = 'distill', top = 5}]\n")
    arguments = ("--strategies=gentle", f"--recipes={recipe}")
    assert bench(*arguments, "--seconds=0") == forgetting.UNFINISHED
    learn = chain.learn
    with monkeypatch.context() as patch:  # time is out after the first update
        patch.setattr(chain, "learn", lambda *given: learn(*given) if given[4] == 1 else stop())
        assert bench(*arguments) == forgetting.UNFINISHED
    assert capsys.readouterr().out.count("gentle lore_0") == 1
    assert bench(*arguments) == 0
    (cell,) = (msgspec.json.decode(path.read_bytes(), type=Cell) for path in tmp_path.rglob("cell.json"))
    assert len(cell.scores) == len(cell.costs) == 2 and not list(tmp_path.rglob(forgetting.PARTIAL))
    page = (tmp_path / "docs" / "forgetting-lore.md").read_text("utf-8")
    assert "| gentle |" in page and "general_ratio=0.1" in page
    assert {path.name for path in (tmp_path / "docs").glob("*.svg")} == {
        "forgetting-lore-R.svg", "forgetting-lore-curves.svg",
    }  # fmt: skip
    first = capsys.readouterr().out
    assert "gentle lore_0" not in first
    monkeypatch.setattr(chain, "train", lambda _: pytest.fail("a finished cell was trained again"))
    assert bench(*arguments) == 0
    assert set(capsys.readouterr().out.splitlines()) <= set(first.splitlines())
    assert bench("--strategies=gentle,naive", f"--recipes={recipe}", "--seeds=0,1", "--report") == 0
    assert (tmp_path / "docs" / "forgetting-lore.md").read_text("utf-8") == page
    with pytest.raises(SystemExit, match="no cell of these"):
        bench("--strategies=naive", "--report")


def test_the_command_measures_a_model_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its base, settings and own strategies, in a child; what the child says of itself is the command's outcome."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "eternad.toml").write_text(
        'library_directory = "l"\nstate_directory = "s"\n[engines.e]\n[models.npc]\nbase_path = "base"\nengine = "e"\n'
        '[models.npc.training]\nlearning_rate = 0.001\n[[models.npc.strategy]]\nname = "replay"\nratio = 0.4\n'
    )
    called: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        called.append(command)
        return subprocess.CompletedProcess(command, len(called) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    options = ["bench", "npc", "--quick", "-o", str(tmp_path / "out"), "-c", str(tmp_path / "eternad.toml")]
    assert cli.main(options) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/forgetting-npc.md\n"
    given = forgetting._parser().parse_args(called[0][3:])
    assert (given.base, given.learning_rate, given.title, given.quick) == (tmp_path / "base", 1e-3, "npc", True)
    assert given.strategies == ["naive", "configured"]
    assert forgetting._read_recipes(given.recipes) == {"configured": [Replay(ratio=0.4)]}
    assert cli.main(options) == 1
    assert "status 1" in capsys.readouterr().err


@pytest.mark.slow
def test_without_general_text_the_drift_is_measured_on_what_the_base_wrote(tiny_base: Path, tmp_path: Path) -> None:
    """On those texts that no trainer rehearses: the trainers' own probes."""
    given = forgetting._parser().parse_args([f"--general={tmp_path / 'none'}", f"--work={tmp_path}"])
    setting = replace(forgetting.setting_of(given), base=tiny_base)
    adapter = load_adapter(tiny_base, Lora(rank=4, alpha=8.0))
    probes = forgetting.own_words(setting, adapter)
    assert setting.probes == () and probes
    written = kept_or_written(tiny_base, setting.work / "cache", adapter)
    rehearsed = {row.example.completion for row in general_rows(written, 1000, 0, random.Random(0))}
    assert not set(probes) & rehearsed


def test_lore_of_a_bench_differs_from_seed_to_seed(bench: Callable[..., int]) -> None:
    """Seeds are independent samples of facts, not only of shuffles."""
    given = forgetting._parser().parse_args(["--lore=2,3"])
    one, two = tasks_of(given, 0), tasks_of(given, 1)
    assert [len(task.test) for task in one] == [9, 9]
    assert one[0].train[0].prompt != two[0].train[0].prompt


CELL = Cell(
    strategy="replay", seed=0, tasks=["a", "b"], recipe=[repr(Replay()), repr(Distill())], learning_rate=1e-3,
    before=[0.0, 0.1], scores=[[0.8, 0.2], [0.6, 0.9]], drift_kl=[0.1, 0.2], drift_nll=[0.0, 0.1],
)  # fmt: skip


def test_numbers_of_a_cell_are_those_of_the_papers() -> None:
    """ACC is the last row's mean, BWT what was lost since learning, FWT what came before learning."""
    numbers = CELL.numbers()
    assert numbers["ACC"] == pytest.approx(75.0)
    assert numbers["BWT"] == pytest.approx(-20.0)
    assert numbers["FWT"] == pytest.approx(10.0)
    assert numbers["drift KL"] == 0.2


def test_a_cell_of_another_setting_is_not_taken_for_this_one() -> None:
    """Another recipe or learning rate is measured anew; results do not matter."""
    from msgspec.structs import replace as changed

    assert CELL.is_same_setting(changed(CELL, scores=[]))
    assert not CELL.is_same_setting(changed(CELL, learning_rate=5e-4))
    assert not CELL.is_same_setting(changed(CELL, recipe=[]))


def test_pictures_are_drawings_of_the_numbers() -> None:
    """Well-formed SVG: every score stands in its cell, every strategy has its line, and names are escaped."""
    drawn = ElementTree.fromstring(heat_maps({"a<b": [[0.0, 0.25], [1.0, 0.5]]}, ["base", "x"], ["x", "y"]))
    assert [text.text for text in drawn.iter(f"{SVG}text")][:5] == ["a<b", "0", "25", "100", "50"]
    drawn = ElementTree.fromstring(curves({"ACC": {"naive": [1.0, 0.5], "replay": [1.0, 2.0]}}))
    lines = [line.attrib["points"].split() for line in drawn.iter(f"{SVG}polyline")]
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    assert heights[0][0] == heights[1][0]
    assert heights[0][1] > heights[0][0] > heights[1][1]  # y points down


def test_many_strategies_stay_legible() -> None:
    """The seventh map begins a new line of maps, and a line whose colour was there before is dashed."""
    names = [f"s{number}" for number in range(10)]
    drawn = ElementTree.fromstring(heat_maps({name: [[0.5]] for name in names}, ["x"], ["x"]))
    at = {text.text: (float(text.attrib["x"]), float(text.attrib["y"])) for text in drawn.iter(f"{SVG}text")}
    assert at["s6"][0] == at["s0"][0] and at["s6"][1] > at["s5"][1] == at["s0"][1]
    assert max(y for _, y in at.values()) < float(drawn.attrib["height"])
    drawn = ElementTree.fromstring(curves({"ACC": {name: [1.0, 0.5] for name in names}}))
    looks = [(line.attrib["stroke"], line.get("stroke-dasharray")) for line in drawn.iter(f"{SVG}polyline")]
    assert looks[0][0] == looks[9][0] and len(set(looks)) == 10


def test_three_seeds_get_an_interval(tmp_path: Path) -> None:
    """One or two do not."""
    from msgspec.structs import replace as changed

    cells = [changed(CELL, seed=seed, scores=[[0.8, 0.2], [0.6, 0.7 + 0.1 * seed]]) for seed in range(3)]
    assert "70.0 [65.0, 75.0]" in write_report(cells, "t", tmp_path).read_text("utf-8")
    assert "[" not in write_report(cells[:2], "t", tmp_path).read_text("utf-8").split("\n")[6]


def test_a_long_sequence_tells_what_each_update_took(tmp_path: Path) -> None:
    """One row per update and the growth per update; a short sequence has no such table."""
    from msgspec.structs import replace as changed

    costs = [
        Cost(cpu_seconds=50.0 + update, tokens=900, peak_memory_bytes=2**30, version_bytes=2**20,
             kept_bytes=2**21 * (update > 0), journal_bytes=(update + 1) * 2**20)
        for update in range(9)
    ]  # fmt: skip
    names = [f"t{number}" for number in range(9)]
    cell = changed(CELL, tasks=names, before=[0.0] * 9, scores=[[0.5] * 9] * 9, drift_kl=[0.1] * 9, costs=costs)
    page = write_report([cell], "long", tmp_path).read_text("utf-8")
    assert "| 9 | 50.0 | 58.0 | 900 | 1024 | 1.0 | 2.0 | 9.0 |" in page
    assert "| growth | +0.0 % | +1.8 % | +0.0 % | +0.0 % | +0.0 % | +0.0 % | +15.4 % |" in page
    assert "growth" not in write_report([CELL], "short", tmp_path).read_text("utf-8")


def test_growth_is_the_slope_once_the_sequence_has_a_past() -> None:
    """The first updates are cheaper, with nothing to replay, and count for nothing."""
    assert growth([1.0, 2.0, 3.0, 10.0, 10.0, 10.0]) == pytest.approx(0.0, abs=1e-9)
    assert growth([0.0, 0.0, 0.0, 9.0, 10.0, 11.0]) == pytest.approx(10.0)
    assert growth([0.0] * 6) == 0.0


def test_joint_training_shows_every_row_as_often_as_the_sequence_does(tmp_path: Path) -> None:
    """The ceiling: one update of one epoch, in which a fact stands eight times and a review twice."""
    setting = Setting(base=Path(), work=Path(), fact_presentations=8, option_epochs=2)
    tasks = [
        Task("facts", [TaskRow("who", " a")], [TaskRow("who", " a")]),
        Task("reviews", [TaskRow("good?", " yes")], [TaskRow("good?", " no", ("yes", "no"))]),
    ]
    assert forgetting.updates_of(tasks, "naive", setting) == tasks
    (joint,) = forgetting.updates_of(tasks, "joint", setting)
    assert setting.epochs(joint) == 1
    shown = [Row(role="new", update=1, id=place, example=row.example) for place, row in enumerate(joint.train)]
    other = Row(role="probe", update=0, id=0, example=joint.train[0].example)
    (tmp_path / "rows").write_bytes(b"\n".join(msgspec.json.encode(row) for row in [*shown, other]))
    digest = chain._show_again(tmp_path / "rows", joint)
    assert digest == hashlib.sha256((tmp_path / "rows").read_bytes()).hexdigest()
    assert list(experience.read(tmp_path / "rows")) == [shown[0]] * 8 + [shown[1]] * 2 + [other]


def test_limits_apply_before_training() -> None:
    """A setting is a value: `replace` makes another one."""
    setting = Setting(base=Path(), work=Path(), test_rows=1)
    task = Task("t", [TaskRow("p", " a")] * 3, [TaskRow("q", " a")] * 3)
    assert len(setting.limited(task).test) == 1
    assert len(replace(setting, test_rows=2).limited(task).test) == 2


def test_score_of_a_task_is_a_share(adapter: Adapter) -> None:
    """Between 0 and 1, of its test rows."""
    own = continuation(adapter, "a", 2)
    assert task_score(adapter, Task("t", [], [TaskRow("a", own), TaskRow(PROMPT, " moths")])) == 0.5
