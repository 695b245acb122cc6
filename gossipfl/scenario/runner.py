"""Running a scenario, on whatever clock.

result = gossipfl.run("quickstart", overrides=["peers=12"])
result = gossipfl.run("combo", clock="virtual")
result.summary["accuracy"]["mean"], result.folder
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossipfl.learning.datasets import Dataset
from gossipfl.scenario.config import Scenario, load_scenario
from gossipfl.scenario.own_objects import take_objects
from gossipfl.scenario.records import check_free
from gossipfl.scenario.results import Observer, RunResult
from gossipfl.scenario.sources import checked_overrides


def run(
    scenario: str | Path | Mapping[str, Any] | Scenario,
    *,
    overrides: Sequence[str] = (),
    clock: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    model: Any = None,
    dataset: Dataset | None = None,
    step: Any = None,
    insecure: bool = False,
    observer: Observer | None = None,
    began: float | None = None,
) -> RunResult:
    """Run a scenario (a file, a built-in name, a dict or a Scenario) to its end and return its result.

    `clock` takes the place of the scenario's: "virtual" runs the machines under virtual time, "local" real processes and
    sockets, "netns" the same with a network namespace for each. `model` (a torch module), `dataset` (a Dataset) and `step`
    (`f(model, x, y) -> loss`) take the place of the scenario's; all peers then live in this process. A copy of `model` is
    trained: all peers start from its values, and it keeps them; `result.model()` has what was learned. ConfigError for what
    cannot be right, RunError if no run came about, RunFailed if too few peers finish, and RunInterrupted, a KeyboardInterrupt,
    after Ctrl-C; the last two have what there is of the run as their `result`.
    """
    if clock is not None:
        overrides = [*checked_overrides(overrides), f"clock={clock}"]
    loaded = load_scenario(scenario, overrides)
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_free(folder, force)  # before torch is loaded, which takes most of the time until a run begins
    objects = take_objects(loaded, model, dataset, step)
    if loaded.network.trace and not loaded.network.trace_after:
        from gossipfl.scenario.planning import check_trace

        check_trace(loaded, dataset, objects["model"])
    observer, began = observer or Observer(), began or time.time()
    match loaded.resolved_clock:
        case "virtual":
            from gossipfl.scenario.simulated import simulate

            return simulate(loaded, folder, force, objects, observer, began).check()
        case _:
            from gossipfl.scenario.launcher import Launcher

            return Launcher(loaded, observer, began, insecure).run(folder, force, objects).check()
