"""What a run will take, before it is run: bytes, time, memory, and which link or device holds everybody up.

    plan = make_plan(load_scenario("combo"))
    plan.received_bytes.mean, plan.timing.round_s, plan.timing.bottleneck

`exchanges` knows what the peers of each protocol send each other in a round, `timing` how long that and training take, `plan`
puts them beside memory and graph and says what is left out, and `view` is what a person sees of it.
"""

from gossipfl.scenario.planning.plan import Plan, check_trace, make_plan

__all__ = ["Plan", "check_trace", "make_plan"]
