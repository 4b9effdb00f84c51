"""How a model learns. Only `request` and `catalog` may be imported without torch."""
