"""`eternad tune`: better settings, searched on a model's own past and proved where nothing was searched."""
