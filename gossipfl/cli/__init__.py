"""The command line. Results go to stdout, progress and messages to stderr.

Exit codes: 0 done (at least `min_peers` peers finished), 1 the run failed, 2 wrong usage or scenario, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Any

try:
    import click

    from gossipfl._version import __version__
    from gossipfl.cli import inference, runs
    from gossipfl.cli.options import EPILOG
except KeyboardInterrupt:
    print("gossipfl: interrupted", file=sys.stderr)
    sys.exit(130)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Ctrl-C while a command is still importing ends with 130 too; left to click, it would be 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("gossipfl: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EPILOG)
@click.version_option(__version__, prog_name="gossipfl")
def main() -> None:
    """Decentralized learning without a server: peers train locally and gossip model segments.

    \b
    gossipfl run quickstart                                  a first run, under a minute
    gossipfl run my.toml --set peers=12 --out runs/mine      your own scenario
    gossipfl run my.toml --json | jq .accuracy               figures for a script
    gossipfl scenarios                                       what comes with gossipfl
    """


for _command in (
    runs.run,
    runs.scenarios,
    runs.peer,
    runs.collect,
    runs.report,
    runs.reproduce,
    runs.topology,
    runs.plan,
    runs.sweep,
    inference.calibrate,
    inference.plan_inference,
    inference.serve,
    inference.device,
    inference.bench_inference,
    inference.export,
):
    main.add_command(_command)
