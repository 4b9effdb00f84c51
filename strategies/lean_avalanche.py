"""Makes `import avalanche` cheap. Every module of `strategies` takes avalanche's classes from here.

`import avalanche` pulls in torchvision, torchmetrics, wandb, matplotlib, QP solvers and downloaders that neither its
templates nor its plugins call here: 4-8 s, 670 MB of memory and over 1 GB of installation. While it is imported, those
of them that are not installed are replaced by stand-ins (0.2 s); afterwards the stand-ins leave `sys.modules` again,
before transformers and peft look for optional packages. From then on using a stand-in raises `ModuleNotFoundError`.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

MAY_BE_ABSENT = frozenset(
    (
        "GPUtil", "PIL", "bs4", "gdown", "gputil", "matplotlib", "mpl_toolkits", "pytorchcv", "qpsolvers", "quadprog",
        "sklearn", "tensorboard", "torchmetrics", "torchvision", "wandb",
    )
)  # fmt: skip


class _StandInClass(type):
    """Class of a stand-in's attributes: good for annotations, bases, decorators and defaults in a class body."""

    in_use = True
    """Whether avalanche is being imported: only then may a stand-in be called."""

    def __getattr__(cls, name: str) -> "_StandInClass":
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(f"{cls.__module__}.{cls.__qualname__}", name)


def _allow_import_time_only(self: Any, *_: Any, **__: Any) -> None:
    if not _StandInClass.in_use:
        # avalanche's own classes may inherit from a stand-in
        roots = [kind.__module__.partition(".")[0] for kind in type(self).__mro__]
        root = next(root for root in roots if root in MAY_BE_ABSENT)
        raise ModuleNotFoundError(f"this part of avalanche needs {root}, which is not installed", name=root)


def _decorate(self: Any, decorated: Any = None, *_: Any, **__: Any) -> Any:
    _allow_import_time_only(self)
    return decorated


def _stand_in(module: str, name: str) -> _StandInClass:
    body = {"__module__": module, "__init__": _allow_import_time_only, "__call__": _decorate}
    return _StandInClass(name, (), body)


class _StandInModule(ModuleType):
    def __getattr__(self, name: str) -> _StandInClass:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(self.__name__, name)


class _StandInFinder(MetaPathFinder, Loader):
    """Last in `sys.meta_path`: asked only for what nobody else found."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the finders' contract
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        absent = fullname.partition(".")[0] in MAY_BE_ABSENT
        return ModuleSpec(fullname, self, is_package=True) if absent else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: attributes are made when asked for."""


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _mend_torchvision() -> "torch.library.Library | None":
    """Declare the operators that a CUDA build of torchvision expects, where torch is a CPU build.

    Otherwise `import torchvision`, and with it avalanche, transformers and peft, fails with `operator
    torchvision::nms does not exist`. The declarations hold as long as the returned library lives.
    """
    if not _is_installed("torchvision") or torch.version.cuda is not None or torch.version.hip is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _needs_mending() -> bool:
    """Whether torchvision is installed and fails on exactly the missing operator."""
    if not _is_installed("torchvision"):
        return False
    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except RuntimeError as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return "torchvision::nms" in str(error)
    return False


def _import_avalanche() -> None:
    if not _is_installed("tensorboard"):  # torch's own wrapper exists, and fails without the package
        sys.modules["torch.utils.tensorboard"] = _StandInModule("torch.utils.tensorboard")
    finder = _StandInFinder()
    sys.meta_path.append(finder)
    try:
        import avalanche.training.plugins
        import avalanche.training.templates  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandInModule)]:
            del sys.modules[name]
        _StandInClass.in_use = False


_operators = _mend_torchvision() if _needs_mending() else None
_import_avalanche()

from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience  # noqa: E402 - possible from here on
from avalanche.benchmarks.scenarios.generic_scenario import CLStream  # noqa: E402
from avalanche.benchmarks.utils.data import AvalancheDataset  # noqa: E402
from avalanche.core import SupervisedPlugin  # noqa: E402
from avalanche.evaluation.metric_results import MetricValue  # noqa: E402
from avalanche.logging.base_logger import BaseLogger  # noqa: E402
from avalanche.training.plugins.early_stopping import EarlyStoppingPlugin  # noqa: E402
from avalanche.training.plugins.evaluation import EvaluationPlugin  # noqa: E402
from avalanche.training.plugins.lr_scheduling import LRSchedulerPlugin  # noqa: E402
from avalanche.training.templates.common_templates import SupervisedTemplate  # noqa: E402

__all__ = [
    "AvalancheDataset",
    "BaseLogger",
    "CLStream",
    "DatasetExperience",
    "EarlyStoppingPlugin",
    "EvaluationPlugin",
    "LRSchedulerPlugin",
    "MetricValue",
    "SupervisedPlugin",
    "SupervisedTemplate",
    "logger_class",
]


def logger_class(name: str) -> Any:
    """One of avalanche's loggers; raises `ModuleNotFoundError` where what it writes with is not installed."""
    import avalanche.logging

    if name == "TensorboardLogger" and not _is_installed("tensorboard"):
        raise ModuleNotFoundError("it needs tensorboard: pip install tensorboard", name="tensorboard")
    return getattr(avalanche.logging, name)
