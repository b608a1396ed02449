"""`python -m launcher` is the `launcher` command."""

from launcher.cli import entry

if __name__ == "__main__":
    entry()
