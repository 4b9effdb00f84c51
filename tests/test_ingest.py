"""Content files: from dropped bytes to examples in the journal, and what is refused with which reason."""

import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffers.example import Example, Message, parse
from daemon import ingest
from daemon.config import Config, Engine, Model, Watch
from daemon.drop_names import printable, real_name
from daemon.ingest import markdown, prose, text
from daemon.ingest.outcome import Outcome
from daemon.state import audit, files, quarantine
from daemon.state.database import Connection, open_database
from daemon.state.files import Finished, Signature

NOW = 1_800_000_000.0


class Site:
    """A library, a database and a daemon's eye on both."""

    def __init__(self, directory: Path, **watch: Any) -> None:
        model = Model(base_path=directory, engine="embedded")
        self.library = directory / "library"
        self.config = Config(
            library_directory=self.library, state_directory=directory / "state",
            models={"npc": model, "director": model}, engines={"embedded": Engine()}, watch=Watch(**watch),
        )  # fmt: skip
        self.database: Connection = open_database(directory / "state" / "eternad.db")

    def write(self, name: str, data: bytes | str) -> Path:
        """Write a file below the library."""
        path = self.library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def finished(self, name: str, problem: str = "") -> Finished:
        """What the watcher would hand over."""
        seen = os.lstat(self.library / name)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        return Finished(path=printable(name), relative=name, signature=signature, problem=problem)

    def drop(self, name: str, data: bytes | str) -> Outcome:
        """Write a file and take it in."""
        self.write(name, data)
        return self.take_in(name)

    def take_in(self, name: str) -> Outcome:
        """Take in a file that is there."""
        return ingest.ingest_file(self.database, self.config, self.finished(name), NOW)

    def examples(self, model: str = "npc") -> list[Example]:
        """Everything in a model's journal, in order."""
        found = self.database.execute("SELECT body FROM example WHERE model = ? ORDER BY id", (model,))
        return [parse(body) for (body,) in found]

    def refusals(self) -> list[tuple[str, str, int | None, int | None]]:
        """(path, code, line, byte offset) of everything in the quarantine, oldest first."""
        return [(row.path, row.code, row.line, row.byte_offset) for row in reversed(quarantine.rows(self.database))]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """An empty site with the models `npc` and `director`."""
    made = Site(tmp_path, chunk_characters=400)
    yield made
    made.database.close()


def asked(question: str, answer: str) -> Example:
    """A demonstration of one question."""
    return Example(shape="demonstration", prompt=(Message("user", question),), completion=answer)


def test_markdown_gives_questions_with_answers_and_prose_under_its_headings(site: Site) -> None:
    """The heading chain stays with each chunk; front matter and raw HTML do not become text."""
    outcome = site.drop(
        "content/npc/lore/library.md",
        "---\ntitle: Lore\n---\n# The Library\n\nIt has <b>no</b> end.\n\n<div>hidden</div>\n\n## The Keeper\n\n"
        "**Q:** Who keeps it?\n**A:** Nobody *does*.\n\nQ: Why?\n\nA: It keeps itself.\n\n```\nQ: in code\n```\n\n---\n"
        "\nHe sleeps.\n",
    )
    assert (outcome.state, outcome.new) == ("read", 4)
    assert site.examples() == [
        Example(shape="text", completion="# The Library\n\nIt has no end."),
        asked("Who keeps it?", "Nobody *does*."),
        asked("Why?", "It keeps itself.\n\n```\nQ: in code\n```"),
        Example(shape="text", completion="# The Library\n\n## The Keeper\n\nHe sleeps."),
    ]
    rows_found = site.database.execute(
        "SELECT collection, origin_file, origin_line FROM example ORDER BY id"
    ).fetchall()
    assert rows_found[1] == ("lore", "content/npc/lore/library.md", 12)
    assert audit.entries(site.database)[-1].event == "file.read"


def test_a_question_without_an_answer_stays_prose(site: Site) -> None:
    """Nothing that a writer wrote is lost."""
    site.drop("content/npc/a.txt", "Q: Is anybody there?\n\nThe hall is silent.\n\nQ: Still?\nA: Yes.\n")
    assert site.examples() == [
        Example(shape="text", completion="Q: Is anybody there?\n\nThe hall is silent."),
        asked("Still?", "Yes."),
    ]


def test_an_edit_changes_few_chunks(site: Site) -> None:
    """Chunk borders are decided by the content: a paragraph in the middle leaves all but its surroundings alone."""
    paragraphs = [f"Paragraph {number} tells of shelf {number * 7}. " * (1 + number % 4) for number in range(200)]
    before = site.drop("content/npc/book.txt", "\n\n".join(paragraphs))
    paragraphs.insert(100, "A new paragraph, that nobody had read before.")
    after = site.drop("content/npc/book.txt", "\n\n".join(paragraphs))
    assert before.new > 40
    assert 1 <= after.new <= 6 and after.duplicates >= before.new - 6


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\r\n \t.!"), max_size=4000))
def test_chunks_hold_every_word_once_and_in_order(whole: str) -> None:
    """Cutting loses nothing and repeats nothing, and no chunk is much larger than asked."""
    with open_text(whole) as descriptor:
        paragraphs = list(text.read_paragraphs(descriptor, 640))
    blocks = [prose.Block("text", each, line) for each, line in paragraphs if "Q" not in each]
    found = [example.completion for example, _ in prose.examples(blocks, 100)]
    wanted = "".join("".join(block.text.split()) for block in blocks)
    assert "".join("".join(chunk.split()) for chunk in found) == wanted
    assert all(len(chunk) <= 100 * 1.5 + 2 * chunk.count("\n\n") for chunk in found)


class open_text:  # noqa: N801 - used as a function
    """A descriptor of an anonymous file with this text."""

    def __init__(self, whole: str) -> None:
        self.descriptor = os.memfd_create("text")
        os.write(self.descriptor, whole.encode())

    def __enter__(self) -> int:
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def test_paragraphs_are_the_same_whatever_the_size_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A character, a line end or a paragraph may lie across two blocks."""
    whole = "\ufeffÉtage un.\r\nLigne deux.\r\n\r\n\r\nDeux 📚.\rTrois.\r\rFin"
    with open_text(whole) as descriptor:
        at_once = list(text.read_paragraphs(descriptor, 1000))
        monkeypatch.setattr("daemon.ingest.opened.BLOCK", 1)
        bytewise = list(text.read_paragraphs(descriptor, 1000))
    assert at_once == bytewise == [("Étage un.\nLigne deux.", 1), ("Deux 📚.\nTrois.", 5), ("Fin", 8)]


def test_bad_lines_are_listed_and_the_good_ones_taken_in(site: Site) -> None:
    """One broken line costs one line; the file stays where it is."""
    outcome = site.drop("content/npc/rows.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": \n\n{"text": "two"}')
    assert (outcome.state, outcome.new, outcome.bad_lines) == ("read", 2, 1)
    assert site.refusals() == [("content/npc/rows.jsonl", "invalid_json", 2, 29)]
    assert (site.library / "content/npc/rows.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "data", "code", "offset"),
    [
        ("a.md", b"\x00\x01", "binary", 0),
        ("a.txt", b"x" * 70_000 + b"\x00", "binary", 70_000),
        ("a.txt", b"\x01" * 10 + b"text", "binary", None),
        ("a.txt", "é".encode("latin-1"), "invalid_utf8", 0),
        ("a.txt", b"ab\xe2\x82", "invalid_utf8", 2),
        ("a.txt", "hello".encode("utf-16"), "binary", 0),
        ("a.md", b"%PDF-1.7", "binary", 0),
        ("a.jsonl", b"\x1f\x8b\x08", "binary", 0),
        ("a.md", b"---\n[\n---\n", "front_matter", None),
        ("a.md", b"---\na: &x [1]\nb: *x\n---\n", "front_matter", None),
    ],
)
def test_a_bad_file_is_moved_to_the_quarantine_with_its_reason(
    site: Site, name: str, data: bytes, code: str, offset: int | None
) -> None:
    """The bytes are kept under a name of ours, the reason beside them, and nothing is in the journal."""
    outcome = site.drop(f"content/npc/{name}", data)
    assert outcome.state == "quarantined" and code in outcome.reason
    row = quarantine.rows(site.database)[0]
    assert (row.code, row.byte_offset) == (code, offset)
    assert not (site.library / "content/npc" / name).exists()
    kept = site.library / "quarantine" / str(row.stored)
    assert kept.read_bytes() == data
    reason = msgspec.json.decode(kept.with_name(kept.name + ".reason.json").read_bytes())
    assert (reason["code"], reason["path"], reason["sha256"]) == (code, f"content/npc/{name}", row.sha256)
    assert site.examples() == [] and files.get(site.database, row.path) is None


def test_misplaced_files_stay_and_the_reason_says_where_to_put_them(site: Site) -> None:
    """An unknown model names the known ones and the nearest; they are noted once and known until they change."""
    for name in ("note.txt", "content/npc.txt", "content/ncp/a.txt", "feedback/npc/a.jsonl", "content/npc/a.xyz"):
        assert site.drop(name, "x").state == "quarantined"
        assert (site.library / name).exists()
        assert files.known(site.database, name) == site.finished(name).signature
    assert [code for _, code, _, _ in site.refusals()] == [
        "misplaced", "misplaced", "unknown_model", "misplaced", "unknown_format",
    ]  # fmt: skip
    message = quarantine.rows(site.database)[2].message
    assert "did you mean `npc`" in message and "director, npc" in message


def test_an_eval_file_is_never_trained_on(site: Site) -> None:
    """Its examples have their own split."""
    site.drop("eval/npc/a.jsonl", '{"prompt": "Who?", "completion": "I."}\n')
    assert site.database.execute("SELECT DISTINCT split FROM example").fetchall() == [("eval",)]


def test_the_same_bytes_are_read_once(site: Site) -> None:
    """A touched file costs a hash, not an example."""
    site.drop("content/npc/a.txt", "Text.")
    os.utime(site.library / "content/npc/a.txt", (1, 1))
    assert site.take_in("content/npc/a.txt").state == "unchanged"
    assert files.known(site.database, "content/npc/a.txt") == site.finished("content/npc/a.txt").signature


def test_a_file_that_was_replaced_by_a_link_is_not_read(site: Site, tmp_path: Path) -> None:
    """Between the watcher's look and the reading, anything may have happened; no link is ever followed."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = site.write("content/npc/a.txt", "Text.")
    seen = site.finished("content/npc/a.txt")
    path.unlink()
    path.symlink_to(secret)
    assert ingest.ingest_file(site.database, site.config, seen, NOW).state == "moved"
    below = site.write("content/npc/lore/b.txt", "Text.").parent
    seen = site.finished("content/npc/lore/b.txt")
    below.rename(tmp_path / "lore")
    below.symlink_to(tmp_path / "lore")
    assert ingest.ingest_file(site.database, site.config, seen, NOW).state == "moved"
    assert site.examples() == []


def test_a_pipe_in_the_place_of_a_file_does_not_block(site: Site) -> None:
    """Opening a FIFO for reading would wait for a writer for ever."""
    path = site.write("content/npc/a.txt", "Text.")
    seen = site.finished("content/npc/a.txt")
    path.unlink()
    os.mkfifo(path)
    assert ingest.ingest_file(site.database, site.config, seen, NOW).state == "moved"


def test_a_file_that_grows_while_it_is_read_counts_for_nothing_yet(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher brings it again when it has settled."""
    path = site.write("content/npc/a.txt", "First.\n\n")
    real = prose.examples

    def slow(*arguments: Any) -> Any:
        with path.open("a") as file:
            file.write("Second.")
        return real(*arguments)

    monkeypatch.setattr(prose, "examples", slow)
    assert site.take_in("content/npc/a.txt").state == "moved"
    assert site.examples() == [] and files.get(site.database, "content/npc/a.txt") is None


def test_what_cannot_be_moved_stays_and_is_known(site: Site) -> None:
    """A read-only library must not make the daemon refuse the same file at every scan."""
    (site.library / "quarantine").mkdir(parents=True)
    (site.library / "quarantine" / "2027-01-15").write_text("in the way")
    outcome = site.drop("content/npc/a.txt", b"\x00")
    assert outcome.state == "quarantined"
    assert files.known(site.database, "content/npc/a.txt") == site.finished("content/npc/a.txt").signature


def test_a_kill_between_refusing_and_moving_is_made_good(site: Site) -> None:
    """The row says `refused` until the file is moved, and a refused file is not known."""
    name = "content/npc/a.txt"
    site.write(name, b"\x00")
    seen = site.finished(name)
    files.put(site.database, files.FileRow(path=name, signature=seen.signature, state="refused"), NOW)
    assert files.known(site.database, name) is None
    assert site.take_in(name).state == "quarantined"
    assert not (site.library / name).exists()


def test_retry_puts_a_file_back_and_drop_deletes_it(site: Site) -> None:
    """What an operator can do with an entry."""
    site.drop("content/npc/a.txt", b"\x00")
    site.drop("content/npc/b.txt", b"\x00\x00")
    second, first = quarantine.rows(site.database)
    ingest.retry(site.database, site.config, first.id, NOW)
    assert (site.library / "content/npc/a.txt").read_bytes() == b"\x00"
    ingest.drop(site.database, site.config, second.id)
    assert [path.name for path in (site.library / "quarantine").rglob("*.*")] == []
    assert quarantine.rows(site.database) == []
    with pytest.raises(ingest.CannotRetry, match="no entry"):
        ingest.retry(site.database, site.config, first.id, NOW)


def test_retry_never_overwrites_a_newer_file(site: Site) -> None:
    """The writer may have dropped a better one meanwhile."""
    site.drop("content/npc/a.txt", b"\x00")
    site.write("content/npc/a.txt", "better")
    with pytest.raises(ingest.CannotRetry, match="exists"):
        ingest.retry(site.database, site.config, quarantine.rows(site.database)[0].id, NOW)


def test_files_for_a_model_that_was_added_later_can_be_retried(site: Site) -> None:
    """`retry_all` takes everything that a change of the configuration may have mended."""
    site.drop("content/book/a.txt", "Text.")
    assert ingest.retry_all(site.database, site.config, NOW) == ["content/book/a.txt is read again"]
    site.config = msgspec.structs.replace(site.config, models=site.config.models | {"book": site.config.models["npc"]})
    assert site.take_in("content/book/a.txt").state == "read"
    assert len(site.examples("book")) == 1


def test_names_of_any_bytes_are_taken_in(site: Site) -> None:
    """Their rows hold printable text, from which the name can be had back."""
    name = os.fsdecode(b"content/npc/line\nbreak \xff \\x0a.txt")
    site.drop(name, "Text.")
    ((path,),) = site.database.execute("SELECT path FROM file").fetchall()
    assert path.isprintable() and real_name(path) == name


@given(st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name))
def test_written_names_can_be_read_back(name: bytes) -> None:
    """`real_name` is the inverse of `printable` for every name that a file system takes."""
    written = printable(os.fsdecode(name))
    assert written.isprintable()
    assert os.fsencode(real_name(written)) == name


HOSTILE = """
    import os, resource, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from daemon import ingest
    from daemon.config import Config, Engine, Model
    from daemon.state.database import open_database
    from daemon.state.files import Finished, Signature
    directory = Path(sys.argv[1])
    config = Config(library_directory=directory / "library", state_directory=directory / "state",
                    models={{"npc": Model(base_path=directory, engine="e")}}, engines={{"e": Engine()}})
    database = open_database(directory / "state" / "db")
    for name in sys.argv[2:]:
        seen = os.lstat(directory / "library" / name)
        signature = Signature(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        outcome = ingest.ingest_file(database, config, Finished(path=name, relative=name, signature=signature), 1.0)
        print(name, outcome.state, outcome.new, outcome.records, outcome.bad_lines)
    # not ru_maxrss: Linux carries that over exec, and the test's own process may be large
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_huge_and_sparse_files_cost_no_memory(tmp_path: Path) -> None:
    """100 GiB of nothing, one line of 2 GiB, 60 MiB without a paragraph: the peak stays below 300 MiB."""
    library = tmp_path / "library"
    for name in ("content/npc", "feedback/npc/game"):
        (library / name).mkdir(parents=True)
    (library / "content/npc/one.txt").write_bytes("é".encode() * 30 * 1024 * 1024)
    (library / "content/npc/long.jsonl").write_bytes(b"[" * 40 * 1024 * 1024 + b'\n{"text": "after"}\n')
    for name, size in (("content/npc/sparse.txt", 100), ("feedback/npc/game/sparse.jsonl", 100)):
        with (library / name).open("wb") as file:
            file.truncate(size * 1024**3)
    with (library / "feedback/npc/game/line.jsonl").open("wb") as file:
        file.truncate(2 * 1024**3)
        file.seek(0, os.SEEK_END)
        file.write(b"\nnot a record\n")
    names = sorted(str(path.relative_to(library)) for path in library.rglob("*.*"))
    script = textwrap.dedent(HOSTILE).format(root=str(Path(__file__).parent.parent))
    child = subprocess.run(
        [sys.executable, "-c", script, tmp_path, *names],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    *told, peak = child.stdout.splitlines()
    states = dict(line.split(" ", 1) for line in told)
    assert states["content/npc/sparse.txt"].startswith("quarantined")
    assert states["content/npc/long.jsonl"] == "read 1 0 1"
    assert states["content/npc/one.txt"] == "read 2 0 0"  # all its chunks but the last are the same one
    assert states["feedback/npc/game/sparse.jsonl"] == "read 0 0 0"
    assert states["feedback/npc/game/line.jsonl"] == "read 0 0 2"
    assert int(peak) < 300 * 1024


def test_markdown_of_many_blocks_stays_in_bounds() -> None:
    """Deep nesting and long runs of markers are what Markdown parsers choke on."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for source in (">" * 20_000 + " x", "- " * 5000 + "x", "[" * 20_000, "*a " * 20_000, "# x\n" * 20_000):
        list(markdown.blocks(source))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 30
