"""What the commands have in common."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TextIO, cast

import click
from rich.console import Console

from gossipfl.errors import GossipflError

EPILOG = "Exit codes: 0 done, 1 the run failed, 2 wrong usage or scenario, 130 interrupted."
FILE_WIDTH = 240
F = Callable[..., Any]


def errors_are_messages(command: F) -> F:
    """A user's mistake, Ctrl-C and SIGTERM end with one clear message and an exit code, never a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from gossipfl.scenario.interrupts import last_interrupt, terminate_is_interrupt

        _open_standard_files()
        with terminate_is_interrupt():
            try:
                return command(*args, **kwargs)
            except GossipflError as error:
                tell(f"gossipfl: {error}")
                sys.exit(error.exit_code)
            except KeyboardInterrupt:
                last_interrupt()
                tell("gossipfl: interrupted")
                sys.exit(130)
            except BrokenPipeError:
                raise  # whoever read stdout has read enough: click ends without a word
            except OSError as error:
                _Lasting(sys.stdout).flush()  # if it is that, Python is not to try again
                where = f": {error.filename}" if error.filename else ""
                tell(f"gossipfl: the system says: {error.strerror or error}{where}; mend that, and give the command again")
                sys.exit(1)

    return wrapped


class _Lasting:
    """A text file that may end before the program does, as a terminal that is closed or a full disk: the rest is lost."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with self._lasting():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._file.flush()

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _open_standard_files() -> None:
    """Those that were closed lead nowhere, lest a file that is opened gets their numbers, and what is meant for them.

    Where a terminal has no character for something, as for the blocks of a topology, a ? stands there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper) and file.errors == "strict":
            file.reconfigure(errors="replace")


def tell(text: str) -> None:
    """A line on stderr, which no command fails for want of."""
    click.echo(text, file=cast(TextIO, _Lasting(sys.stderr)))


def stderr_console() -> Console:
    """Progress on stderr, which no command fails for want of. A bracket in a name or a message is a bracket, as below."""
    return Console(file=cast(TextIO, _Lasting(sys.stderr)), markup=False)


class Number(click.FloatRange):
    """Click's own lets nan pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


def stdout_console() -> Console:
    """As wide as the terminal; what goes to a file is as wide as its figures need."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(width=width, markup=False)


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change any key of the scenario; may be repeated."
)
insecure_option = click.option("--insecure", is_flag=True, help="Listen beyond loopback, though peers are not authenticated.")
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")
