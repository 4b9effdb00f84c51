"""`import avalanche` without what it does not need, in a fresh interpreter each."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    """What `code` prints in a new interpreter; its errors are shown."""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_nothing_of_the_stand_ins_is_left_after_the_import() -> None:
    """Other libraries must not find a torchvision that is none; plugins of avalanche are there all the same."""
    code = """
import sys, importlib.util
from strategies import lean_avalanche
from avalanche.training.plugins import EWCPlugin, ReplayPlugin, LwFPlugin, SynapticIntelligencePlugin
from avalanche.training.supervised import Naive
missing = [name for name in lean_avalanche.MAY_BE_ABSENT if importlib.util.find_spec(name) is None]
print(bool(missing), [name for name in sys.modules if name.partition(".")[0] in missing])
print([finder for finder in sys.meta_path if "StandIn" in type(finder).__name__])
"""
    assert python(code).splitlines() == ["True []", "[]"]


def test_using_a_stand_in_names_the_missing_package() -> None:
    """A part of avalanche that really needs an absent package says so instead of doing nothing."""
    code = """
from strategies import lean_avalanche
from avalanche.benchmarks.classic import SplitMNIST
try:
    SplitMNIST(n_experiences=5)
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert python(code) == "torchvision"


def test_a_torchvision_for_another_torch_is_mended(tmp_path: Path) -> None:
    """A torchvision that fails on the operator `torchvision::nms` imports once the operators are declared."""
    package = tmp_path / "torchvision"
    package.mkdir()
    broken = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda dets, scores, iou_threshold: dets)\n"
    (package / "__init__.py").write_text(broken)
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    failing = f"{before}\ntry:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)"
    assert python(failing) == "operator torchvision::nms does not exist"
    assert python(f"{before}\nfrom strategies import lean_avalanche\nimport torchvision\nprint('works')") == "works"
