"""One training loop on one process or many: what the loop asks for (`contract`) and one module per engine."""
