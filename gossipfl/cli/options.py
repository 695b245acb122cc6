"""What the commands have in common."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

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

        try:
            with terminate_is_interrupt():
                return command(*args, **kwargs)
        except GossipflError as error:
            click.echo(f"gossipfl: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            last_interrupt()
            click.echo("gossipfl: interrupted", err=True)
            sys.exit(130)

    return wrapped


class Number(click.FloatRange):
    """Click's own lets nan pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


def stdout_console() -> Console:
    """As wide as the terminal; what goes to a file is as wide as its figures need."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH)


set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change any key of the scenario; may be repeated."
)
insecure_option = click.option("--insecure", is_flag=True, help="Listen beyond loopback, though peers are not authenticated.")
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")
