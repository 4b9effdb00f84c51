"""The dashboard and the alert rules in `ops/`: whatever they name exists in a scrape, and every expression parses."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from operator_kit import make_config, make_state, snapshot
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from daemon import config as configuration
from daemon.state.database import open_read_only
from daemon.web import metrics

OPS = Path(__file__).resolve().parent.parent / "ops"
NAME = re.compile(r"\b(?:eternad|process)_[a-z_]+\b")
OF_PROMETHEUS = {"job", "instance"}
VARIABLES = {"$model": "npc", "${datasource}": "prometheus"}


def rules() -> list[dict[str, Any]]:
    """Every alert rule."""
    document = YAML(typ="safe").load(OPS / "prometheus-alerts.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Every panel of the dashboard."""
    found: list[dict[str, Any]] = json.loads((OPS / "grafana-dashboard.json").read_text())["panels"]
    return found


def expressions() -> Iterator[str]:
    """Every PromQL expression of both files, with Grafana's variables filled in."""
    dashboard = json.loads((OPS / "grafana-dashboard.json").read_text())
    targets = [target["expr"] for panel in panels() for target in panel["targets"]]
    notes = [note["expr"] for note in dashboard["annotations"]["list"]]
    for text in [*(rule["expr"] for rule in rules()), *targets, *notes]:
        filled = text
        for name, value in VARIABLES.items():
            filled = filled.replace(name, value)
        yield filled


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Metric -> its labels: of those that are defined, and of a real scrape."""
    directory = tmp_path_factory.mktemp("monitoring")
    config = configuration.load(make_config(directory))
    database = open_read_only(make_state(directory) / "eternad.db")
    text = metrics.text(config, database, snapshot() | {"at": time.time()}).decode()
    database.close()
    found = {f"eternad_{gauge.name}": {"model", *gauge.labels} for gauge in metrics.GAUGES}
    found |= {f"eternad_{name}_total": set() for name in metrics.COUNTED}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_metric_that_is_named_exists(known: dict[str, set[str]]) -> None:
    """A metric that is renamed takes its panels and alerts along."""
    used = {name for text in expressions() for name in NAME.findall(text)}
    assert len(used) > 25
    assert used <= set(known)


def test_every_expression_parses() -> None:
    """As Prometheus would."""
    for text in expressions():
        promql_parser.parse(text)


def test_every_label_that_is_named_is_on_its_metric(known: dict[str, set[str]]) -> None:
    """Legends and alert texts use labels that the metrics of their expression have."""
    wordings = [(rule["expr"], json.dumps(rule["annotations"])) for rule in rules()]
    wordings += [(each["expr"], each["legendFormat"]) for panel in panels() for each in panel["targets"]]
    for text, wording in wordings:
        labels = set(re.findall(r"\{\{ *(?:\$labels\.)?([a-z]+) *\}\}", wording))
        labels |= set(re.findall(r"([a-z]+)\s*=~?\s*\"", text))
        has = set[str]().union(*(known[name] for name in NAME.findall(text)))
        assert labels <= has | OF_PROMETHEUS, (text, wording)


def test_every_alert_says_what_to_do() -> None:
    """A severity, what happened, and a next step; names are unique."""
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_no_panel_hides_another() -> None:
    """Panels have ids of their own, and places that do not overlap."""
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
