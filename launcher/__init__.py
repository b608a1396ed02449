"""From one typed recipe to a running, resumable, fast training job."""

__version__ = "0.5.0"
