"""A run on XLA's CPU device, for an environment that has torch-xla; ``python -m tests.xla`` there."""
