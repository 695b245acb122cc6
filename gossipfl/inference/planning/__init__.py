"""Decisions of inference: pure functions and machines over numbers that were measured elsewhere."""
