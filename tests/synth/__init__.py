"""Models for tests and benchmarks; `python -m tests.synth` is the command line.

GGUFs come from `nexus_ext.testing.synthetic`, which plugins are tested with as well. Folders of
Hugging Face (`hf`) and hand-made NXF files (`nxf`) are of use here alone.
"""
