"""Published results, run again: what was published and what is measured, side by side.

    gossipfl reproduce combo

Each reproduction lists its arms and makes tables of what they came to; nothing in it is fitted to what was published. Arms are
scenarios for the virtual clock, or whatever else the reproduction has a function to run with (see `Reproduction.run`). To add
one, register it in `REPRODUCTIONS` from a file in this folder and import it here.
"""

from gossipfl.scenario.reproduce.ari import ari
from gossipfl.scenario.reproduce.bacombo import bacombo
from gossipfl.scenario.reproduce.combo import combo
from gossipfl.scenario.reproduce.epidemic import epidemic
from gossipfl.scenario.reproduce.figures import REPRODUCTIONS, Outcome, Reproduction, Row, Table, find_data, run_arms
from gossipfl.scenario.reproduce.mosaic import mosaic
from gossipfl.scenario.reproduce.qpart import qpart

__all__ = [
    "REPRODUCTIONS",
    "Outcome",
    "Reproduction",
    "Row",
    "Table",
    "ari",
    "bacombo",
    "combo",
    "epidemic",
    "find_data",
    "mosaic",
    "qpart",
    "run_arms",
]
