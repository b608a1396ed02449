"""The run directory: the one thing both sides share besides the schema; standard library only."""
