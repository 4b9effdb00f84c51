"""What a model has been shown and what it keeps. Never imports torch."""
