"""Fuzzing: inputs by the million, for minutes; not a part of the default tests."""
