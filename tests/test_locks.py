"""`requirements.lock` is installed with `--no-deps`: what its packages need stands in it, or is left out on purpose."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {
    # stand-ins take their place, see strategies/lean_avalanche.py
    "avalanche-lib": {"gputil", "scikit-learn", "matplotlib", "pytorchcv", "wandb", "tensorboard", "torchvision",
                      "torchmetrics", "gdown", "qpsolvers"},
    "huggingface-hub": {"hf-xet"},  # downloads, which nothing here does
    "torch": {"setuptools"},  # C++ extensions
}  # fmt: skip


def canonical(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, str]:
    """Package -> version of a lock file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonical(line.split("==")[0]): line.split("==")[1] for line in lines}


LOCK = locked("requirements.lock")


@pytest.mark.parametrize("package", sorted(LOCK))
def test_what_a_locked_package_needs_is_locked(package: str) -> None:
    """An installation by the lock alone is whole: typer once needed pydantic, which only the tests' lock had."""
    said = [Requirement(text) for text in importlib.metadata.requires(package) or []]
    needed = [each for each in said if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert {canonical(each.name) for each in needed} - set(LOCK) == LEFT_OUT.get(package, set())
    versions = [(each, LOCK.get(canonical(each.name))) for each in needed]
    assert [str(each) for each, version in versions if version and not each.specifier.contains(version, True)] == []
