"""The trainer core: what one rank does, from the run directory alone; it knows no target, no scheduler and no command line."""
