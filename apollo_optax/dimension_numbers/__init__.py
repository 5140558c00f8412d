"""Dimension numbers, read off a model or given by rules, and a table of the optimizer state."""
