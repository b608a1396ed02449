"""The `launcher` command: finds the verb, loads only its module, turns a user's mistake into a message and code 2."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
from typing import NoReturn

import click

from launcher import __version__
from launcher.errors import EXIT_USER_ERROR, UserError, nearest

# verb -> (module, one line of help); the module is imported when the verb is called and defines `command`
VERBS: dict[str, tuple[str, str]] = {
    "run": ("launcher.cli.run", "Train here; resumes if the run exists."),
    "resume": ("launcher.cli.resume", "Go on with a run, with changes listed."),
    "render": ("launcher.cli.render", "Print the job a recipe would submit; submit nothing."),
    "submit": ("launcher.cli.submit", "Hand a run's job to a scheduler, or start it in the background."),
    "cancel": ("launcher.cli.cancel", "Stop a run for good, submitted or in a terminal."),
    "worker": ("launcher.cli.worker", "One node's part of a job, as schedulers start it."),
    "show": ("launcher.cli.show", "Print the composed recipe; --origin says where each value came from."),
    "check": ("launcher.cli.check", "Say everything that is wrong with recipes."),
    "plan": ("launcher.cli.plan", "Print what follows from a recipe by arithmetic: mesh, batch, memory."),
    "prepare": ("launcher.cli.prepare", "Tokenise and pack a recipe's data into the store."),
    "preview": ("launcher.cli.preview", "Show rows as tokens, with trained tokens and document borders visible."),
    "data": ("launcher.cli.data", "Ask a recipe's data: stats counts lengths, sources, what is trained or lost."),
    "runs": ("launcher.cli.runs", "List runs with their states."),
    "status": ("launcher.cli.status", "Say how a run stands: state, step, attempts, failures."),
    "logs": ("launcher.cli.logs", "Print a rank's log."),
    "checkpoint": ("launcher.cli.checkpoint", "Look after a run's checkpoints: list, verify, prune, repair."),
    "import-checkpoint": (
        "launcher.cli.import_checkpoint",
        "Make a new run that goes on from another tool's checkpoint.",
    ),
    "doctor": ("launcher.cli.doctor", "Say what this machine has for training; --build-ops compiles ahead."),
    "export": ("launcher.cli.export", "Write a Hugging Face folder from the newest checkpoint."),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            raise click.UsageError(f"No such verb '{name}'. {nearest(name, VERBS)} See launcher --help.")
        command: click.Command = importlib.import_module(VERBS[name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="launcher %(version)s")
def _command() -> None:
    """From one typed recipe to a running, resumable, fast training job.

    A recipe's key is changed by KEY=VALUE, not by an option:

      launcher run recipes/tiny-cpu.yaml train.max_steps=5
    """


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    try:
        code = _command.main(args=argv, prog_name="launcher", standalone_mode=False)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USER_ERROR)
    except click.exceptions.Abort:
        sys.exit(130)
    except BrokenPipeError:  # `launcher logs | head`
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def entry() -> NoReturn:
    """The command as a program; a thread that waits in torch's store would abort the interpreter's own shutdown."""
    try:
        main()
    except SystemExit as end:
        if "torch" not in sys.modules:
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a pipe whose reader has gone, or closed
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
    raise AssertionError("main ends by SystemExit")
