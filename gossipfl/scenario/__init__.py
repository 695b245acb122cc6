"""What a person asks for: the scenario of a run, from a file, a dictionary or keyword arguments."""

from gossipfl.scenario.config import Scenario, check_names, load_scenario
from gossipfl.scenario.problems import ScenarioError
from gossipfl.scenario.sources import builtin_scenarios

__all__ = ["Scenario", "ScenarioError", "builtin_scenarios", "check_names", "load_scenario"]
