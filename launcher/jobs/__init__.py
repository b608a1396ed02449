"""Starting a run: job specs, the targets that render them, and the supervisor that runs one here."""
