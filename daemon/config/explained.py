"""The configuration explained: the TOML of `eternad init` and the tables of `docs/configure.md`.

Both are made of the text that stands under the fields of `daemon.config.tables`, `strategies.catalog` and
`strategies.request`, so they can never differ from what the program reads. The text is read by `ast`, since Python
does not keep it: importing a module throws the string under a field away.
"""

import ast
import inspect
import itertools
import json
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from buffers.policy import Buffer
from daemon.config import recipe, tables
from daemon.notify.settings import EVENTS, Notify
from daemon.rollout import Rollout
from daemon.trust.metric import Metric
from daemon.trust.policy import Source, Trust
from daemon.tuning.rules import Tuning
from strategies.catalog import BY_NAME
from strategies.parallel.choice import Parallel
from strategies.request import Lora, Training

WIDTH = 100
TABLES: tuple[tuple[str, type], ...] = (
    ("", tables.Config), ("watch", tables.Watch), ("trust", Trust),
    ("trust.sources.NAME", Source), ("metrics.NAME", Metric), ("web", tables.Web),
    ("intake", tables.Intake), ("gateway", tables.Gateway),
    ("notify", Notify),
    ("engines.NAME", tables.Engine), ("models.NAME", tables.Model), ("models.NAME.lora", Lora),
    ("models.NAME.training", Training), ("models.NAME.buffer", Buffer),
    ("models.NAME.schedule", tables.Schedule), ("models.NAME.gate", tables.Gate),
    ("models.NAME.tuning", Tuning), ("models.NAME.parallel", Parallel),
    ("models.NAME.rollout", Rollout),
)  # fmt: skip
"""The tables of the file in their order; `[[models.NAME.strategy]]` comes after them."""


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key of one table."""

    name: str
    kind: str
    """As a person reads it: `number > 0`."""
    default: str | None
    """In TOML; None: it must be given; empty: it may be left out and has no default."""
    meaning: str
    is_table: bool


def keys_of(table: type) -> list[Key]:
    """The keys of a table in the order in which they stand in the program."""
    meanings, kinds = _texts(table), _annotations(table)
    return [
        Key(
            name=field.encode_name, kind=_kind(kinds[field.name]), default=_default(field),
            meaning=meanings.get(field.name, ""), is_table=_is_table(field),
        )
        for field in msgspec.structs.fields(table)
    ]  # fmt: skip


@cache
def _class(table: type) -> ast.ClassDef:
    tree = ast.parse(inspect.getsource(sys.modules[table.__module__]))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == table.__name__)


def _texts(table: type) -> dict[str, str]:
    """Field -> the string that follows it."""
    body = _class(table).body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def _annotations(table: type) -> dict[str, str]:
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in _class(table).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


_KINDS = {
    "Count": "whole number >= 1", "Positive": "number > 0", "NotNegative": "number >= 0", "Share": "0 <= number < 1",
    "float": "number", "int": "whole number", "str": "text", "bool": "true or false", "Path": "path",
    "list[str]": "list of texts", "dict[str, Model]": "tables", "dict[str, Engine]": "tables",
    "dict[str, Source]": "tables", "dict[str, Metric]": "tables",
    "list[Personal]": "list of `email`, `phone`, `iban`, `credit_card`, `ip`",
    "list[Event]": "list of " + ", ".join(f"`{event}`" for event in EVENTS),
    "Whole": "whole number >= 0", "list[Strategy]": "list of tables",
    "dict[str, float | int | str | bool]": "table of values", "list[Percent]": "list of numbers > 0, < 100",
}  # fmt: skip


def _kind(annotation: str) -> str:
    annotation = annotation.removesuffix(" | None")
    if annotation.startswith("Literal["):
        return " or ".join(f"`{choice}`" for choice in ast.literal_eval(f"({annotation[8:-1]},)"))
    if annotation.startswith("Annotated["):
        return _limited(annotation)
    return _KINDS.get(annotation, "table")


def _limited(annotation: str) -> str:
    """`Annotated[float, msgspec.Meta(ge=0, le=0.5)]` -> `number >= 0, <= 0.5`."""
    inner, meta = ast.parse(annotation, mode="eval").body.slice.elts  # type: ignore[attr-defined]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = ", ".join(f"{signs[each.arg]} {ast.unparse(each.value)}" for each in meta.keywords)
    return f"{_KINDS[ast.unparse(inner)]} {limits}"


def _value(field: msgspec.structs.FieldInfo) -> Any:
    if field.default is not msgspec.NODEFAULT:
        return field.default
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else msgspec.NODEFAULT


def _is_table(field: msgspec.structs.FieldInfo) -> bool:
    of_tables = ("models", "engines", "sources", "strategy")
    return isinstance(_value(field), msgspec.Struct) or field.encode_name in of_tables


def _default(field: msgspec.structs.FieldInfo) -> str | None:
    value = _value(field)
    if value is msgspec.NODEFAULT:
        return None
    return "" if value is None or isinstance(value, msgspec.Struct) else json.dumps(value)


# -- the file that `eternad init` writes ------------------------------------------------------------------------------


GIVEN_TABLES = (tables.Config, tables.Engine, tables.Model, tables.Web)
"""Where `commented` sets keys; other tables may have some of the same name: `engine` of the tuning is no server."""


def commented(model: str, base: Path) -> str:
    """A configuration that works once `base` holds a model: required keys and those of the recipe are set."""
    given = {
        "library_directory": "library", "state_directory": "state", "base_path": str(base), "engine": "local",
        "urls": ["http://127.0.0.1:8900"], "listen": "127.0.0.1:8787",
    }  # fmt: skip
    given_in: dict[type, dict[str, Any]] = {Training: recipe.pace_for(base)._asdict()}
    given_in |= dict.fromkeys(GIVEN_TABLES, given)
    lines = ["# eternad: relative paths are relative to this file. `eternad check-config` checks it.", ""]
    for name, table in TABLES:
        if name in ("trust.sources.NAME", "metrics.NAME"):
            continue  # which sources and metrics there are, only the operator knows
        header = name.replace("engines.NAME", "engines.local").replace("models.NAME", f"models.{model}")
        lines += _table_lines(header, table, given_in.get(table, {}))
    for name, strategy in BY_NAME.items():
        lines += _strategy_lines(model, name, strategy)
    return "\n".join(lines).rstrip() + "\n"


def _table_lines(header: str, table: type, given: dict[str, Any]) -> list[str]:
    lines = [*_comment(_doc(table)), f"[{header}]"] if header else []
    for key in keys_of(table):
        if not key.is_table:
            lines += [*_comment(key.meaning), _assignment(key, given)]
    return [*lines, ""]


def _assignment(key: Key, given: dict[str, Any]) -> str:
    if key.name in given:
        return f"{key.name} = {json.dumps(given[key.name])}"
    if not key.default:
        return f"# {key.name} = ...  ({key.kind})"
    return f"# {key.name} = {key.default}"


def _strategy_lines(model: str, name: str, strategy: type) -> list[str]:
    """The recipe is switched on: without rehearsal a model forgets; the others wait for somebody who wants them."""
    off = "" if name in recipe.RECIPE else "# "
    lines = [*_comment(_doc(strategy)), f"{off}[[models.{model}.strategy]]", f'{off}name = "{name}"']
    for key in keys_of(strategy):
        lines += [*_comment(key.meaning), f"# {key.name} = {key.default}"]
    return [*lines, ""]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH - 2)]


def _doc(table: type) -> str:
    return inspect.cleandoc(table.__doc__ or "").split("\n\n")[0]


# -- docs/configure.md ------------------------------------------------------------------------------------------------


def reference() -> str:
    """The tables of `docs/configure.md`, in Markdown."""
    parts = [_section(f"[{name}]" if name else "Top level", table) for name, table in TABLES]
    parts += [_section(f'[[models.NAME.strategy]] name = "{name}"', strategy) for name, strategy in BY_NAME.items()]
    return "\n".join(parts)


def _section(title: str, table: type) -> str:
    lines = [f"### {'`' + title + '`' if title.startswith('[') else title}", "", _doc(table), ""]
    lines += ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [_row(key) for key in keys_of(table)]
    return "\n".join([*lines, ""])


def _row(key: Key) -> str:
    default = "required" if key.default is None else f"`{key.default}`" if key.default else ""
    cells = (f"`{key.name}`", key.kind, default, " ".join(key.meaning.split()) or "see its table" * key.is_table)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rewrite(page: Path, text: str) -> None:
    """Put `text` behind the page's marker, the comment that ends the part written by hand."""
    written, marker, _ = page.read_text("utf-8").partition("` -->\n")
    if not marker:
        raise ValueError(f"{page} has no marker `<!-- ...: made by `...` -->`")
    page.write_text(written + marker + text, "utf-8")


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), reference())
