"""Avalanche's own `Naive` strategy and training loop on the same PEFT model: float32, padded, its own AdamW loop."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.peers.trainers import peft_model
from bench.peers.work import Mark, Result, Work, child, mark, result_of
from strategies.lean_avalanche import (
    AvalancheDataset,
    BaseLogger,
    DatasetExperience,
    EvaluationPlugin,
    SupervisedPlugin,
)

IGNORED = -100


class Classifier(nn.Module):
    """A language model as Avalanche wants one: scores per position, classes in the second dimension."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """(documents, length) -> (documents, vocabulary, length); padding at the end needs no mask."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.transpose(1, 2)


class Documents(Dataset[tuple[Tensor, Tensor, int]]):
    """(tokens, next tokens, task label), padded at the end to the longest document: Avalanche's loop stacks them."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents
        self.length = max(len(document) for document in documents)
        self.targets = [0] * len(documents)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, int]:
        document = self.documents[place]
        padding = self.length - len(document)
        tokens = torch.tensor(document + [0] * padding)
        return tokens, torch.tensor(document[1:] + [IGNORED] * (padding + 1)), 0


class Silent(BaseLogger):
    """Avalanche warns where it has no logger."""


class Stopwatch(SupervisedPlugin[Any], supports_distributed=True):
    """Marks the end of every step, and clips as the others do."""

    def __init__(self, clip_norm: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clip_norm = clip_norm
        self.marks: list[Mark] = []

    def before_update(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Clip the gradient."""
        torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), self.clip_norm)

    def after_training_iteration(self, strategy: Any, *_: Any, **__: Any) -> None:
        """One step more."""
        self.marks.append(mark(float(strategy.loss.detach())))


def measure(work: Work, _: str) -> Result:
    """Train one experience of `steps` batches."""
    # possible only now: `strategies.lean_avalanche` has imported it with what it needs
    from avalanche.training.supervised.strategy_wrappers import Naive

    model = Classifier(peft_model(work, torch.float32))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    watch = Stopwatch(work.clip_norm)
    strategy = Naive(
        model=model, optimizer=torch.optim.AdamW(trained, lr=work.learning_rate, weight_decay=work.weight_decay),
        criterion=nn.CrossEntropyLoss(ignore_index=IGNORED), train_mb_size=len(work.batches[0]), train_epochs=1,
        plugins=[watch], evaluator=EvaluationPlugin(loggers=[Silent()]),  # type: ignore[no-untyped-call]
    )  # fmt: skip
    dataset = AvalancheDataset([Documents(work.documents)])
    experience = DatasetExperience(dataset=dataset, current_experience=0)
    strategy.train(experience, eval_streams=[], shuffle=False, num_workers=0)
    return result_of(work, watch.marks)


if __name__ == "__main__":
    child(measure)
