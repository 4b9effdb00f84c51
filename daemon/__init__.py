"""When something is learned and what is served. Never imports torch."""
