"""Losses for what players prefer: DPO for comparisons, KTO for single ratings. Pure functions on log-probabilities.

The implied reward of an answer y is r = beta (log pi(y|x) - log pi_ref(y|x)), summed over its tokens; pi_ref is the
version that the run started from, whose log-probabilities the loop computes once per update.

- DPO, Rafailov et al., arXiv:2305.18290: -log sigmoid(r_chosen - r_rejected); with `smoothing` e the conservative form
  (1 - e) and e of the same with the pair turned round (Mitchell 2023), for comparisons of which a share e is wrong.
- KTO, Ethayarajh et al., arXiv:2402.01306: w_d (1 - sigmoid(r - z)) for a liked answer, w_u (1 - sigmoid(z - r)) for a
  disliked one. z stands for beta KL(pi || pi_ref). The paper estimates it from the other prompts' answers in the batch;
  here it is 0, the value at which every run starts and from which a gated update may not stray far. The loss of an
  example then depends on nothing but the example, so micro-batches, ranks and resumed runs all compute the same. (The
  form is known as APO-zero for unpaired data, D'Oosterlinck et al., arXiv:2408.06266.)

Neither knows how long an answer is: longer ones have larger |r|. Replay and a KL to the base belong beside them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from buffers.example import Shape
from strategies.dataset import Item
from strategies.learner import PreferenceLoss

BETA = 0.1
"""Both papers' usual value: how far from the reference a given reward takes the policy."""


def dpo_loss(policy: Tensor, reference: Tensor, beta: float = BETA, smoothing: float = 0.0) -> Tensor:
    """(items,) losses. policy, reference: (items, 2) summed log-probabilities of the chosen and the rejected answer."""
    reward = beta * (policy - reference)
    margin = reward[:, 0] - reward[:, 1]
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def kto_loss(
    policy: Tensor, reference: Tensor, liked: Tensor, weights: tuple[float, float], beta: float = BETA, z: float = 0.0
) -> Tensor:
    """(items,) losses. policy, reference: (items,) summed log-probabilities; liked: (items,) bool.

    weights: of liked and of disliked answers.
    """
    lead = beta * (policy - reference) - z
    return torch.where(liked, weights[0] * torch.sigmoid(-lead), weights[1] * torch.sigmoid(lead))


def class_weights(labels: Iterable[bool]) -> tuple[float, float]:
    """(liked, disliked): each class weighs half of all, whatever their counts; a class that is alone weighs 1."""
    liked = list(labels)
    likes, total = sum(liked), len(liked)
    if likes in (0, total):
        return 1.0, 1.0
    return total / (2 * likes), total / (2 * (total - likes))


def preference_losses(
    items: Sequence[Item], beta: float = BETA, smoothing: float = 0.0
) -> Mapping[Shape, PreferenceLoss]:
    """The losses by shape for a run over `items`; KTO's classes are balanced over the whole run, not per batch."""
    weights = class_weights(bool(item.label) for item in items if item.shape == "boolean")

    def comparison(policy: Tensor, reference: Tensor, items: Sequence[Item]) -> Tensor:  # noqa: ARG001 - the contract
        return dpo_loss(policy, reference, beta, smoothing)

    def boolean(policy: Tensor, reference: Tensor, items: Sequence[Item]) -> Tensor:
        liked = torch.tensor([bool(item.label) for item in items], device=policy.device)
        return kto_loss(policy[:, 0], reference[:, 0], liked, weights, beta)

    return {"comparison": comparison, "boolean": boolean}


def judged_losses(
    items: Sequence[Item], policy: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]], beta: float
) -> list[float]:
    """One loss per held-out item: DPO's of a comparison, KTO's of a rating, every rating weighing 1.

    policy, reference: summed log-probabilities of completion and rejected completion. At the reference itself a
    comparison has log 2 and a rating 1/2.
    """
    now, then = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    compared = torch.tensor([item.rejected is not None for item in items])
    liked = torch.tensor([bool(item.label) for item in items])
    rated = kto_loss(now[:, 0], then[:, 0], liked, (1.0, 1.0), beta)
    return torch.where(compared, dpo_loss(now, then, beta), rated).tolist()
