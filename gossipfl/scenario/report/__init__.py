"""A run, or several beside each other, as one HTML file that opens without a network.

    write_report([Path("runs/quickstart")])                              # -> runs/quickstart/report.html
    write_report([Path("runs/a"), Path("runs/b")], out=Path("ab.html"))  # curves overlaid, figures with ratios to runs/a

`reading` takes up the record; `curves`, `timeline`, `links` and `tables` make of it what is shown; `page` writes the HTML, and
the numbers of every plot as CSV beside it. A record may come from anywhere: nothing in it is run, and its text is escaped.
"""

from gossipfl.scenario.report.page import write_report

__all__ = ["write_report"]
