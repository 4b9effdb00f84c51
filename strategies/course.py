"""The training phase of one update: Avalanche's loop with the configured methods, early stopping and checkpoints."""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from buffers.experience import Role
from strategies import checkpoint, plugins, resume
from strategies.adapter import Adapter
from strategies.avalanche_stopping import Stopping
from strategies.consolidate import search
from strategies.dataset import Item
from strategies.early_stop import EarlyStop
from strategies.ema import SlowAverage
from strategies.evaluate import Probes, has_token_loss
from strategies.mix import per_epoch
from strategies.preference import preference_losses
from strategies.pulse import Interrupted, Pulse
from strategies.request import RunRequest, Training
from strategies.template import Events, Template, UpdateExperience, trainable

SECONDS_BETWEEN_CHECKPOINTS = 60.0
OUT_OF_MEMORY_RETRIES = 3
TRAINED_ROLES: tuple[Role, ...] = ("new", "derived", "replay", "general")


@dataclass
class Course:
    """One attempt at training; its methods are what the loop calls."""

    run_directory: Path
    request: RunRequest
    adapter: Adapter
    items: Mapping[Role, Sequence[Item]]
    probes: Probes
    pulse: Pulse
    previous: torch.Tensor | None = None
    """(parameters,) the weights of the version before, where training begins with others (a rebase)."""

    def __post_init__(self) -> None:
        training = self.request.training
        self.learners = plugins.build(self.request.strategies)
        self.early = EarlyStop(
            new=[item for item in self.probes.new if has_token_loss(item)],
            old=[item for items in self.probes.old.values() for item in items if has_token_loss(item)],
            patience=training.early_stop_patience,
            old_rise=training.early_stop_old_loss,
            new_rise=training.early_stop_new_loss,
        )
        self.stopping = next((each for each in self.learners if isinstance(each, Stopping)), None)
        """Avalanche's early stopping, where it is to decide instead of ours."""
        self._began = self._saved = time.monotonic()
        self._tokens_before = 0
        """Tokens that were trained on before an interruption."""

    def run(self) -> Template:
        """Train, from the run's checkpoint if there is one; the adapter then holds the best weights."""
        if self.continued is not None:
            checkpoint.load_states(self.continued / "strategy", self.learners)
        torch.manual_seed(self.request.seed + self.adapter.backend.rank)  # dropout: another one in each process
        rows = [item for role in TRAINED_ROLES for item in self.items.get(role, ())]
        items = as_new(self.items) if self.request.rebase else self.items
        template = Template(
            adapter=self.adapter,
            training=self.request.training,
            items=items,
            learners=self.learners,
            preference_losses=preference_losses(rows, self.request.training.preference_beta),
            update=self.request.update_number,
            seed=self.request.seed,
            previous=self.previous,
            per_epoch=per_epoch(items, self.request.strategies),
            events=Events(self._after_start, self._after_step, self._after_epoch, self._before_consolidation),
        )
        if self.request.training.recompute_layers:
            template.report("memory", "layers_recomputed", 1.0)
        own = trainable(rows, template.preference_losses)
        template.train(UpdateExperience(own, self.request.update_number), eval_streams=[])
        return template

    @property
    def continued(self) -> Path | None:
        """The version whose adapter, methods and optimiser this run goes on with; none in a rebase."""
        return None if self.request.rebase else self.request.parent_version

    def _after_start(self, loop: Template) -> None:
        if self.request.training.keep_optimizer and self.continued is not None:
            resume.restore_optimizer(loop, checkpoint.load_optimizer(self.continued / "strategy"))
        with self.adapter.holding(loop.previous):
            self.early.begin(self.adapter)
        found = checkpoint.read_checkpoint(self.run_directory, self.request.experience_sha256)
        if found is not None:
            resume.restore(loop, self.early, *found)
        self._tokens_before = loop.position.tokens
        self._began = self._saved = time.monotonic()

    def _after_step(self, loop: Template) -> None:
        now = time.monotonic()
        rate = (loop.position.tokens - self._tokens_before) / max(now - self._began, 1e-9)
        left = loop.position.tokens / loop.step * (loop.steps - loop.step) / rate
        self.pulse.step(
            loop.step, loop.steps, loop.step / loop.steps * loop.train_epochs, loop.position.losses[-1][1], rate, left
        )
        is_due = now - self._saved > SECONDS_BETWEEN_CHECKPOINTS
        leaving, saving = self.adapter.backend.any(self.pulse.is_told_to_stop, is_due)
        if leaving or saving:
            resume.write(self.run_directory, loop, self.early, self.request.experience_sha256)
            self._saved = time.monotonic()
        if leaving:
            raise Interrupted

    def _after_epoch(self, loop: Template) -> None:
        if self.stopping is not None:
            return
        if reason := self.early.check(self.adapter, loop.position.step / max(loop.steps, 1)):
            loop.stop(reason)

    def _before_consolidation(self, loop: Template) -> None:
        if self.stopping is not None:
            self.stopping.restore(loop)
        else:
            self.early.restore(self.adapter)
        self.pulse.enter("fisher")
        if self.request.rebase:  # a fresh adapter and its predecessor have nothing in common that could be mixed
            loop.report("rebase", "examples", sum(len(self.items.get(role, ())) for role in ("new", "replay")))
        elif self.early.old:
            self._consolidate(loop)

    def _consolidate(self, loop: Template) -> None:
        """Go back towards the weights before the update, or to the slow average, as the old hold-outs ask for."""
        average = next((each for each in self.learners if isinstance(each, SlowAverage)), None)
        rise, limit = 0.0, self.request.training.merge_old_loss
        if self.request.training.merge_search:
            weight, merged, rise = search(loop.start, self.adapter.flat.clone(), self._rise_of, limit)
            self.adapter.assign(merged)
            loop.report("merge", "weight", weight)
            loop.report("merge", "old_loss_rise", rise)
        elif average is not None:
            rise = self.early.rise(self.adapter)
        if average is not None and rise > limit:
            average.offer(loop, rise, self._rise_of)

    def _rise_of(self, flat: torch.Tensor) -> float:
        with self.adapter.holding(flat):
            return self.early.rise(self.adapter)


def as_new(items: Mapping[Role, Sequence[Item]]) -> dict[Role, Sequence[Item]]:
    """To a fresh adapter everything is new: EWC takes importances from all of it, DER++ stores answers to all of it."""
    return {**items, "new": [*items.get("new", ()), *items.get("replay", ())], "replay": []}


def train(
    run_directory: Path,
    request: RunRequest,
    adapter: Adapter,
    items: Mapping[Role, Sequence[Item]],
    probes: Probes,
    pulse: Pulse,
    fresh: torch.Tensor | None = None,
) -> Template:
    """Train with as many tokens per forward pass as the memory allows (see `ever_smaller`).

    `fresh` (parameters,): weights to begin with in place of the adapter's own, which are the version before (a rebase).
    Not on several processes: one that lacks memory cannot begin anew while the others wait for its part.
    """
    before = adapter.flat.clone()
    start, previous = (before, None) if fresh is None else (fresh, before)
    adapter.assign(start)
    attempts = list(ever_smaller(request.training))
    for training in attempts:
        attempt = msgspec.structs.replace(request, training=training)
        adapter.state.recomputes = training.recompute_layers
        try:
            return Course(run_directory, attempt, adapter, items, probes, pulse, previous).run()
        except (RuntimeError, MemoryError) as error:
            if not resume.is_out_of_memory(error) or adapter.backend.size > 1 or training is attempts[-1]:
                raise
        adapter.assign(start)
        checkpoint.remove_checkpoint(run_directory)  # it was cut differently: not bit for bit the same
        gc.collect()
    raise AssertionError("the last attempt returns or raises")


def ever_smaller(training: Training) -> Iterator[Training]:
    """The configured settings, then ones that need less memory and give the same steps.

    Passes of half the tokens, three times; when that is not enough, layers that the backward pass computes again.
    """
    for halved in range(OUT_OF_MEMORY_RETRIES + 1):
        tokens = max(training.micro_batch_tokens >> halved, 1)
        yield msgspec.structs.replace(training, micro_batch_tokens=tokens)
    if not training.recompute_layers:
        yield msgspec.structs.replace(training, micro_batch_tokens=tokens, recompute_layers=True)
