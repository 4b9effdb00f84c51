"""The gateway: OpenAI's API under names that stay, over versions that move. No torch, no database."""
