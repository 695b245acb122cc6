"""What a run will take, before it is run: bytes, time, memory, and which link or device holds everybody up.

    plan = make_plan(load_scenario("combo"))
    plan.received_bytes.mean, plan.timing.round_s, plan.timing.bottleneck

`rehearsal` runs the first rounds without learning, `timing` says what holds them up, `plan` puts that beside memory and graph
and says what it is not of, and `view` is what a person sees of it.
"""

from gossipfl.scenario.planning.plan import Plan, check_trace, make_plan

__all__ = ["Plan", "check_trace", "make_plan"]
