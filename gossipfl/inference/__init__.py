"""The co-located inference module: quantize, partition and serve the trained model, and fall back where it is in doubt.

planning/   what is decided, from numbers alone: bits per layer, the cut, thresholds with a guarantee, who answers
execution/  what runs: the model as a chain of layers, its stages, the engines that they run on, calibration
"""
