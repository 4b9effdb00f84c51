"""The embedded OpenAI-compatible inference engine (transformers + peft)."""
