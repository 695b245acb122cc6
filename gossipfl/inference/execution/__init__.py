"""What inference runs: the model as a chain of layers, cut into stages, on the engines that this machine has."""
