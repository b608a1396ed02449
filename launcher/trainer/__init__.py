"""The trainer core: what one rank does, from the run directory alone; it knows no target, scheduler or command line."""
