"""Avalanche's training loop for a causal language model with a LoRA adapter.

Avalanche stays the frame: experiences, the order of events, plugins, the clock. Overridden is what assumes a
classifier: mini-batch unpacking, forward pass, criterion, the optimiser's parameter list. One iteration is one
optimiser step over `batch_examples` examples, in as many forward passes as `micro_batch_tokens` asks for:

- `before_forward`, `after_forward`: once per forward pass; `strategy.mb_output` holds the hidden states of label rows;
- `before_backward`: once per iteration, at its last forward pass: a plugin may add to `strategy.loss` (on several
  processes each adds its part: the sum of them counts);
- `after_backward`: once per iteration: `strategy.adapter.gradient` is the gradient of the whole batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from buffers.example import Shape
from buffers.experience import Role
from strategies import request
from strategies.adapter import Adapter
from strategies.dataset import Item, MicroBatch, TokenDataset, batches, micro_batches
from strategies.failure import Failure
from strategies.forward import TopRows, completion_logprobs, label_states, sequence_logprobs, top_rows
from strategies.lean_avalanche import (
    AvalancheDataset,
    BaseLogger,
    CLStream,
    DatasetExperience,
    EvaluationPlugin,
    SupervisedTemplate,
)
from strategies.learner import Learner, PreferenceLoss, RowTerm, Teacher
from strategies.mix import shown
from strategies.token_loss import token_loss


class UpdateExperience(DatasetExperience[Any]):
    """What one update trains on, as Avalanche sees it."""

    def __init__(self, items: Sequence[Item], update: int) -> None:
        self.items = list(items)
        super().__init__(dataset=AvalancheDataset([TokenDataset(self.items)]), current_experience=update)
        self.origin_stream = CLStream("train", [self], set_stream_info=False)  # what loggers call it by


class _Silent(BaseLogger):
    """What happened stands in the run's report; Avalanche warns where it has no logger at all."""

    def __init__(self) -> None:
        """Avalanche's own forbids loggers in all processes but the first; this one says nothing in any."""


@dataclass
class Position:
    """Where a run stands between two optimiser steps; what a checkpoint keeps besides tensors."""

    step: int = 0
    tokens: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    counters: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped_early: str = ""


@dataclass(frozen=True)
class Events:
    """What the owner of the loop wants to be told; each does nothing by default."""

    after_start: Callable[["Template"], None] = lambda _: None
    """Everything is set up and no step done: the place to restore a checkpoint."""
    after_step: Callable[["Template"], None] = lambda _: None
    """Between two steps: progress, checkpoints; may raise to leave."""
    after_epoch: Callable[["Template"], None] = lambda _: None
    """At the end of an epoch: early stopping; may call `stop`."""
    before_consolidation: Callable[["Template"], None] = lambda _: None
    """Training is over: put the best weights into the adapter."""


class Template(SupervisedTemplate[Any, Any, Any]):
    """The loop; implements `strategies.learner.Loop`."""

    experience: Any
    """UpdateExperience"""
    mbatch: Any
    """MicroBatch"""
    mb_output: Any
    """See `forward`."""

    def __init__(
        self,
        *,
        adapter: Adapter,
        training: request.Training,
        items: Mapping[Role, Sequence[Item]],
        learners: Sequence[Learner] = (),
        preference_losses: Mapping[Shape, PreferenceLoss] | None = None,
        update: int = 1,
        seed: int = 0,
        previous: Tensor | None = None,
        per_epoch: Mapping[Role, int] | None = None,
        events: Events | None = None,
    ) -> None:
        super().__init__(
            model=adapter.model,
            optimizer=adapter.backend.optimizer(training),
            train_mb_size=training.batch_examples,
            train_epochs=training.epochs,
            device=adapter.device,
            plugins=list(learners),
            evaluator=EvaluationPlugin(loggers=[_Silent()]),
        )
        self.adapter, self.training, self.items, self.update, self.seed = adapter, training, items, update, seed
        self.learners = list(learners)
        self.preference_losses = dict(preference_losses or {})
        self.events = events or Events()
        self.generator = torch.Generator().manual_seed(seed)
        self.micro_batch_tokens = training.micro_batch_tokens
        self.start = adapter.flat.clone()
        """(parameters,) the weights that training begins with."""
        self.previous = self.start if previous is None else previous
        """(parameters,) those of the version before: the teacher `previous`, the reference of preferences. Not the
        same in a rebase, where a fresh adapter learns."""
        self.per_epoch = dict(per_epoch or {})
        """How many rows of a role an epoch shows (`strategies.mix`); all of those that are not named."""
        self.position = Position()
        self.epoch = 0
        self.steps = 0
        self.schedules_rate = True
        """Whether the learning rate follows `schedule`; a plugin may take it over."""
        self.step_items: list[Item] = []
        self._reference: dict[Item, Tensor] = {}

    # What a method of learning asks for (see `strategies.learner.Loop`)

    @property
    def step(self) -> int:
        """Optimiser steps done so far."""
        return self.position.step

    def gradient_of(self, items: Sequence[Item], term: RowTerm | None = None) -> Tensor:
        """(parameters,) gradient of the mean token loss on `items`, or of `term` instead, without dropout."""
        kept, backend = trainable(items, {}), self.adapter.backend
        # too few to share are done by every process for itself: no sum to wait for
        shared = len(items) >= backend.size
        cut = (backend.passes if shared else micro_batches)(kept, self.micro_batch_tokens)
        with self._reference_gradient() as gradient:
            for micro in cut:
                hidden = label_states(self.adapter, micro)
                loss = self._token_loss(micro, hidden) if term is None else self._token_loss(micro, hidden, 0.0, [term])
                backend.backward(loss)
            return backend.sum(gradient.clone()) if shared else gradient.clone()

    def per_example_squared_gradients(self, items: Sequence[Item]) -> Tensor:
        """(parameters,) mean of the squared gradients of each item's own mean token loss."""
        total, backend = torch.zeros_like(self.adapter.flat), self.adapter.backend
        for micro in backend.passes(trainable(items, {}), self.micro_batch_tokens, alone=True):
            with self._reference_gradient() as gradient:
                backend.backward(self._token_loss(micro, label_states(self.adapter, micro)))
                total.addcmul_(gradient, gradient, value=1 / len(items))
        return backend.sum(total)

    @contextmanager
    def _reference_gradient(self) -> Iterator[Tensor]:
        """An empty gradient, without dropout, for a while."""
        with self.adapter.own_gradient() as gradient, self.adapter.without_dropout(), torch.enable_grad():
            yield gradient

    def teacher_top(self, items: Sequence[Item], teacher: Teacher, top: int) -> list[TopRows]:
        """The teacher's `top` most likely tokens at every label row of every item."""
        weights: dict[Teacher, Callable[[], AbstractContextManager[None]]] = {
            "base": self.adapter.disabled,
            "previous": lambda: self.adapter.holding(self.previous),
            "current": nullcontext,
        }
        with self.adapter.without_dropout(), weights[teacher]():
            return top_rows(self.adapter, items, top)

    def report(self, name: str, key: str, value: float) -> None:
        """Remember one number of a method for the report."""
        self.position.counters.setdefault(name, {})[key] = value

    # The loop

    def stop(self, reason: str) -> None:
        """Leave the loop after this epoch."""
        self.position.stopped_early = reason
        self.stop_training()

    def check_model_and_optimizer(self, **_: Any) -> None:
        """Nothing to adapt: the model does not grow, and the optimiser holds the one flat parameter."""

    def make_train_dataloader(self, *_: Any, **__: Any) -> None:
        """Take the items of the dataset, which plugins may have changed; `training_epoch` cuts the batches."""
        dataset: Any = self.adapted_dataset
        self.dataloader = own = [self.experience.items[int(dataset[place][2])] for place in range(len(dataset))]
        if not any(item.label_tokens for item in own):
            raise Failure("nothing_to_learn", "no example has a token to learn after cutting at sequence_tokens")
        an_epoch = len(shown(own, self.per_epoch, self.seed, 0))
        self.steps = self.train_epochs * math.ceil(an_epoch / self.train_mb_size)
        with self.adapter.holding(self.previous):
            self._reference = completion_logprobs(self.adapter, [item for item in own if item.is_preference])

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        self.events.after_start(self)
        per_epoch = self.steps // self.train_epochs
        # a run that was interrupted after the last step of an epoch has not ended that epoch yet
        for epoch in range(max(self.step - 1, 0) // per_epoch, self.train_epochs):
            if self._stop_training:
                return
            self.epoch = epoch
            self._before_training_epoch(**kwargs)
            if self._stop_training:
                return
            self.training_epoch(skip=self.step - self.epoch * per_epoch, **kwargs)
            self._after_training_epoch(**kwargs)
            self.events.after_epoch(self)

    def training_epoch(self, skip: int = 0, **kwargs: Any) -> None:
        """One pass over the items; `skip` optimiser batches were done before an interruption."""
        order = shown(cast(list[Item], self.dataloader), self.per_epoch, self.seed, self.epoch)
        for batch in batches(order, self.train_mb_size, self.seed, self.epoch)[skip:]:
            self.step_items = batch
            self._before_training_iteration(**kwargs)
            self.adapter.gradient.zero_()
            loss = self._accumulate(**kwargs)
            self._after_backward(**kwargs)
            self._optimise(**kwargs)
            self.position.step += 1
            self.position.tokens += sum(len(item.tokens) for item in self.step_items)
            self.position.losses.append((self.step, loss))
            self._after_training_iteration(**kwargs)
            self.events.after_step(self)

    def _accumulate(self, **kwargs: Any) -> float:
        """Forward and backward over all micro-batches of the step; returns the mean loss of its items.

        Each process does its part of them; afterwards every process has the gradient and the loss of the whole batch.
        """
        total, backend = 0.0, self.adapter.backend
        cut = backend.passes(self.step_items, self.micro_batch_tokens)
        with self.adapter.dropping():
            for self.mbatch in cut:
                self._before_forward(**kwargs)
                self.mb_output = self.forward()
                self._after_forward(**kwargs)
                self.loss = self.criterion()
                if not self.loss.requires_grad:
                    raise Failure("nothing_to_learn", "the loss does not depend on any adapter parameter")
                total += float(self.loss.detach())
                if self.mbatch is cut[-1]:
                    self._before_backward(**kwargs)
                self.backward()
        backend.sum(self.adapter.gradient)
        total = float(backend.sum(torch.tensor(total, dtype=torch.float64)))
        if not math.isfinite(total):
            raise Failure("non_finite_loss", f"the loss became {total} at step {self.step + 1}; lower learning_rate")
        return total

    def _optimise(self, **kwargs: Any) -> None:
        norm = self.adapter.gradient.norm()
        if not torch.isfinite(norm):
            raise Failure("non_finite_loss", f"the gradient became {norm} at step {self.step + 1}; lower learning_rate")
        if self.step == 0 and norm == 0:
            raise Failure("nothing_to_learn", "the first gradient is zero: no adapter parameter reaches the loss")
        self.adapter.gradient.mul_((self.training.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.schedules_rate:
            self.optimizer.param_groups[0]["lr"] = self.training.learning_rate * schedule(
                self.step, self.steps, self.training.warmup_share
            )
        self._before_update(**kwargs)
        self.optimizer_step()
        self.adapter.refresh()
        self._after_update(**kwargs)

    def _after_training_exp(self, **kwargs: Any) -> None:
        self.events.before_consolidation(self)
        super()._after_training_exp(**kwargs)

    def backward(self) -> None:
        """Through the backend, which may have to prepare its shards for it."""
        self.adapter.backend.backward(self.loss)

    def optimizer_step(self) -> None:
        """The backend's: its optimiser may be divided among the processes."""
        self.adapter.backend.step()

    def model_adaptation(self, model: Any = None) -> Any:
        """The model stays what it is."""
        return self.model if model is None else model

    def _unpack_minibatch(self) -> None:
        """A micro-batch is moved to the device where it is used."""

    # One forward pass

    def forward(self) -> Tensor:
        """(label rows, hidden) for token losses; (items, 2) log-probabilities for preferences."""
        if self.mbatch.is_preference:
            return sequence_logprobs(self.adapter, self.mbatch)
        return label_states(self.adapter, self.mbatch)

    def criterion(self) -> Tensor:
        """This micro-batch's part of the batch loss; which loss an item has is decided by its shape."""
        micro: MicroBatch = self.mbatch
        if micro.is_preference:
            return self._preference_loss(micro, self.mb_output)
        # items with a preference loss take their share of the batch
        share = sum(not item.is_preference for item in self.step_items) / len(self.step_items)
        terms = [term for learner in self.learners if (term := learner.row_term(self, micro)) is not None]
        return self._token_loss(micro, self.mb_output, share, terms)

    def _token_loss(
        self, micro: MicroBatch, hidden: Tensor, share: float = 1.0, terms: Sequence[RowTerm] = ()
    ) -> Tensor:
        targets = micro.targets.to(self.device)
        weight: float | Tensor = share / micro.batch_label_tokens
        if any(item.is_anchor for item in micro.items):
            learned = torch.tensor([float(not item.is_anchor) for item in micro.items])
            weight = (learned[micro.owner] * weight).to(self.device)
        return token_loss(hidden, self.adapter.head, targets, weight, list(terms))[0]

    def _preference_loss(self, micro: MicroBatch, policy: Tensor) -> Tensor:
        reference = torch.stack([self._reference[item] for item in micro.items])
        total = policy.new_zeros(())
        for shape, loss in self.preference_losses.items():
            own = [place for place, item in enumerate(micro.items) if item.shape == shape]
            if own:
                total = total + loss(policy[own], reference[own], [micro.items[place] for place in own]).sum()
        return total / micro.batch_items


def schedule(step: int, steps: int, warmup_share: float) -> float:
    """Factor of the learning rate at `step` (from 0) of `steps`: linear warm-up, then a cosine to 0."""
    warmup = math.ceil(steps * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def trainable(items: Sequence[Item], preference_losses: Mapping[Shape, PreferenceLoss]) -> list[Item]:
    """Items whose shape has no preference loss become demonstrations of what was preferred or liked."""
    kept = [item for item in items if item.shape in preference_losses or item.label is not False]
    return [
        item if item.shape in preference_losses or not item.is_preference
        else replace(item, shape="demonstration", rejected=None, label=None)
        for item in kept
    ]  # fmt: skip
