"""HF Trainer and TRL's SFTTrainer on a PEFT model.

Variants: `hf` (Trainer's defaults: float32, padded), `trl` (SFTTrainer's defaults: autocast to bfloat16, gradient
checkpointing, padded), `trl-padding-free` and `trl-packing` (SFTTrainer's best options: base in bfloat16, no
checkpointing; each batch in one row, or rows of the longest document's length filled best-fit decreasing).
"""

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from bench.peers.work import Mark, Result, Work, child, mark, result_of

BEST = ("trl-padding-free", "trl-packing")


def peft_model(work: Work, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The same adapter as ours: same rank, same seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(work.base, dtype=dtype, attn_implementation=attention)
    torch.manual_seed(work.seed)
    config = LoraConfig(
        r=work.rank, lora_alpha=int(work.alpha), lora_dropout=0.0, task_type="CAUSAL_LM", target_modules="all-linear"
    )
    with warnings.catch_warnings(action="ignore"):  # peft asks transformers for a property by its old name
        return get_peft_model(model, config)


def watched(trainer: type[Any]) -> type[Any]:
    """The trainer with the documents in their order, and its step ends marked."""
    from torch.utils.data import SequentialSampler

    class Watched(trainer):  # type: ignore[misc,unused-ignore]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return Watched


def stopwatch(marks: list[Mark]) -> Any:
    """A callback that marks the end of every step."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(mark())

    return Stopwatch()


def options(work: Work, directory: str) -> dict[str, Any]:
    """What all trainers share; the rest are their defaults."""
    return {
        "output_dir": directory, "per_device_train_batch_size": len(work.batches[0]), "max_steps": work.steps,
        "learning_rate": work.learning_rate, "weight_decay": work.weight_decay, "max_grad_norm": work.clip_norm,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "seed": work.seed,
    }  # fmt: skip


def rows_of(documents: Sequence[list[int]], labelled: bool) -> Any:
    """A dataset of token ids."""
    import datasets  # type: ignore[import-not-found]

    rows: dict[str, list[list[int]]] = {"input_ids": list(documents)}
    if labelled:
        rows |= {"labels": list(documents), "attention_mask": [[1] * len(document) for document in documents]}
    return datasets.Dataset.from_dict(rows)


def hf(work: Work, directory: str) -> Any:
    """HF's Trainer; labels of padding are ignored (the collator for language models would drop every end token)."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(work.base)
    return watched(Trainer)(
        model=peft_model(work, torch.float32), args=TrainingArguments(**options(work, directory)),
        train_dataset=rows_of(work.documents, True), data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip


def trl(work: Work, directory: str, variant: str) -> Any:
    """TRL's SFTTrainer."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    given = options(work, directory) | {"max_length": max(len(document) for document in work.documents)}
    if variant in BEST:
        given |= {"gradient_checkpointing": False, "bf16": False}
    if variant == "trl-padding-free":
        given |= {"padding_free": True, "max_length": None}
    if variant == "trl-packing":
        tokens = sum(len(document) for document in work.batches[0])
        given |= {
            "packing": True,
            "packing_strategy": "bfd",
            "per_device_train_batch_size": round(tokens / given["max_length"]),
        }
    model = peft_model(work, torch.bfloat16, "eager") if variant in BEST else peft_model(work, torch.float32)
    return watched(SFTTrainer)(
        model=model, args=SFTConfig(**given), train_dataset=rows_of(work.documents, False),
        processing_class=AutoTokenizer.from_pretrained(work.base),
    )  # fmt: skip


def measure(work: Work, variant: str) -> Result:
    """Train for `steps` steps."""
    marks: list[Mark] = []
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(action="ignore"):
        trainer = hf(work, directory) if variant == "hf" else trl(work, directory, variant)
        trainer.add_callback(stopwatch(marks))
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = [Mark(cpu=one.cpu, wall=one.wall, loss=loss) for one, loss in zip(marks, losses, strict=True)]
    if variant == "trl-packing":
        return packed(trainer.train_dataset, found, int(trainer.args.per_device_train_batch_size))
    return result_of(work, found)


def packed(dataset: Any, marks: list[Mark], rows: int) -> Result:
    """Packing cuts its own batches: count what was trained in the timed steps."""
    from bench.peers.work import peak_bytes

    lengths = [len(ids) for ids in dataset["input_ids"]]
    timed = sum(lengths[rows : rows * len(marks)])
    return Result(marks=marks, timed_tokens=timed, peak_bytes=peak_bytes(), notes={"own_batches": True})


if __name__ == "__main__":
    child(measure)
