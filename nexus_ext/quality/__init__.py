"""How good a model's predictions are, and how to spend bits on its weights: pure functions.

Arrays in, numbers out: nothing here opens a file, runs a model or reads a clock.
"""
