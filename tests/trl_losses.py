"""Runs in .venv-bench: TRL's own DPO and KTO losses on log-probabilities that stand in a file.

`python trl_losses.py IN OUT`: IN holds what policy and reference say of every token, zero where there is no label.
TRL computes a loss inside its trainers, from a model's outputs; so the model here is one that answers what it is told.
"""

import json
import sys
import types
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer


class Told(torch.nn.Module):
    """A model that says the given log-probabilities, whatever it is asked."""

    def __init__(self, logprobs: torch.Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **_: Any) -> Any:
        """(sequences, tokens) each."""
        nothing = torch.zeros_like(self.logprobs)
        return types.SimpleNamespace(
            log_probs=self.logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


def stand_in(kind: type, model: Told, **settings: Any) -> Any:
    """A trainer without a data set: what the loss reads, and nothing else."""
    made = kind.__new__(kind)
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda each: each, gather=lambda each: each,
        autocast=nullcontext, unwrap_model=lambda each: each,
    )  # fmt: skip
    known = {
        "model": model, "accelerator": accelerator, "aux_loss_enabled": False, "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
        "args": types.SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None), "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False,
        "loss_weights": [1.0], "label_smoothing": 0.0, "ref_model": None,
    }  # fmt: skip
    for name, value in {**known, **settings}.items():
        object.__setattr__(made, name, value)
    return made


def main(source: Path, target: Path) -> None:
    """Both losses, one example at a time: TRL's mean over a batch is then the example's own."""
    given = json.loads(source.read_text("utf-8"))
    beta, found = given["beta"], {"dpo": [], "kto": []}
    for pair in given["comparisons"]:
        logprobs = torch.tensor([pair["chosen"], pair["rejected"]])
        inputs = inputs_of(logprobs) | {
            "ref_chosen_logps": torch.tensor([pair["reference"][0]]),
            "ref_rejected_logps": torch.tensor([pair["reference"][1]]),
        }  # fmt: skip
        model = Told(logprobs)
        trainer = stand_in(DPOTrainer, model, beta=beta, loss_types=["sigmoid"])
        found["dpo"].append(float(DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)))
    for rated in given["ratings"]:
        logprobs = torch.tensor([rated["logprobs"]])
        inputs = inputs_of(logprobs) | {
            "label": torch.tensor([rated["liked"]]),
            "ref_logps": torch.tensor([rated["reference"]]),
        }
        model = Told(logprobs)
        trainer = stand_in(
            KTOTrainer, model, beta=beta, loss_type="apo_zero_unpaired", calculate_KL=False,
            desirable_weight=given["weights"][0], undesirable_weight=given["weights"][1],
        )  # fmt: skip
        found["kto"].append(float(KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)))
    target.write_text(json.dumps(found), "utf-8")


def inputs_of(logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch in TRL's form, one token longer than what is predicted of it."""
    sequences, tokens = logprobs.shape
    labelled = torch.cat([torch.zeros(sequences, 1, dtype=torch.long), (logprobs != 0).long()], 1)
    ids = torch.ones(sequences, tokens + 1, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": labelled}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
