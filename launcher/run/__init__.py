"""The run directory: the one place where launch side and trainer core meet. Standard library only."""
