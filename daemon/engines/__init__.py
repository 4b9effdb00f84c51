"""One small module per inference engine, one contract (`contract.Engine`)."""
