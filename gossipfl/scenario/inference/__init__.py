"""Serving what a run has trained: `gossipfl calibrate`, `plan-inference`, `serve`, `device`, `bench-inference`, `export`."""
