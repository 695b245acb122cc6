"""Writes the page: everything inlined in one HTML file, and the numbers of the plots as CSV beside it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gossipfl._version import __version__
from gossipfl.errors import ConfigError
from gossipfl.scenario.report import tables
from gossipfl.scenario.report.curves import plot_curves, plot_segment_staleness, run_keys
from gossipfl.scenario.report.links import plot_topology, plot_traffic
from gossipfl.scenario.report.plots import Plot
from gossipfl.scenario.report.reading import Run, read_runs, title
from gossipfl.scenario.report.timeline import plot_timeline

OWN_TABLE = re.compile(
    r"([0-9]+-)?(runs|accuracy-over-\w+|consensus-distance|staleness|staleness-by-segment|timeline|traffic|topology|faults|planned)"
    r"\.csv"
)
"""What a report names its tables."""


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of the runs in `folders` to `out` (default: report.html in the first of them), and return its path.

    The CSV files go to the folder of the same name that ends in .csv (report.csv/); where there are several runs, those of one
    alone begin with its number in runs.csv. ConfigError if a folder holds no run or `out` cannot be written.
    """
    out = out or folders[0] / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out} is no page; give a name that ends in .html")
    template, plotly = _template_and_plotly()  # before a long record is read
    runs = read_runs(folders)
    shared = plot_curves(runs)
    own = [[plot_timeline(run), plot_traffic(run), plot_topology(run), *plot_segment_staleness(run)] for run in runs]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_page(template, plotly, runs, shared, own), encoding="utf-8")
        _write_tables(out.with_suffix(".csv"), runs, shared, own)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out} cannot be written: {error.strerror}; give another place with --out"
        ) from error
    return out


def _page(template: Any, plotly: str, runs: Sequence[Run], shared: Sequence[Plot], own: Sequence[Sequence[Plot]]) -> str:
    """The HTML. Jinja escapes all text; the plots' own text was escaped when they were made."""
    drawn = {_id(plot): plot for plot in shared} | {_id(plot, place): plot for place, plots in enumerate(own) for plot in plots}
    specs = {key: {"data": plot.traces, "layout": plot.layout} for key, plot in drawn.items() if not plot.missing}
    return template.render(
        title=title(runs),
        runs=runs,
        keys=run_keys(runs) if len(runs) > 1 else [],
        shared=shared,
        own=own,
        id=_id,
        tables=tables,
        version=__version__,
        specs=_inline_json(specs),
        css=_own_file("page.css"),
        script=_own_file("page.js"),
        plotly=plotly,
    )


def _template_and_plotly() -> tuple[Any, str]:
    """The page's template and plotly.js. ConfigError where a library of the extra is not installed."""
    try:
        from jinja2 import Environment
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(f"a report needs {error.name}, which is not installed: pip install 'gossipfl[report]'") from error
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_own_file("page.html")), get_plotlyjs()


def _own_file(name: str) -> str:
    return files("gossipfl.scenario.report").joinpath(name).read_text(encoding="utf-8")


def _id(plot: Plot, place: int | None = None) -> str:
    """In the page; `place` of the run, where the plot is of one alone."""
    return plot.key if place is None else f"run{place}-{plot.key}"


def _inline_json(values: Any) -> str:
    """JSON that no text in it can end early: `<` and `&` mean nothing but themselves."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write_tables(folder: Path, runs: Sequence[Run], shared: Sequence[Plot], own: Sequence[Sequence[Plot]]) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if OWN_TABLE.fullmatch(path.name):
            path.unlink()  # of an earlier report, of which this one may have no counterpart
    if len(runs) > 1:
        numbered = enumerate(runs, start=1)
        _write_rows(
            folder / "runs.csv", ("number", "run", "folder"), [(place, run.name, run.folder) for place, run in numbered]
        )
    for plot in shared:
        _write_columns(folder / f"{plot.key}.csv", plot.columns)
    for place, (run, plots) in enumerate(zip(runs, own, strict=True), start=1):
        prefix = "" if len(runs) == 1 else f"{place}-"
        for plot in plots:
            _write_columns(folder / f"{prefix}{plot.key}.csv", plot.columns)
        _write_rows(folder / f"{prefix}faults.csv", tables.FAULT_COLUMNS, tables.faults(run))
        if run.planned:
            _write_rows(folder / f"{prefix}planned.csv", tables.PLANNED_COLUMNS, tables.planned(run))


def _write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    if columns:
        _write_rows(path, list(columns), zip_longest(*columns.values()))


def _write_rows(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    """As it is; empty where it is not known, and without `.0` where it is whole."""
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return ""
    return int(value) if value.is_integer() else float(value)
