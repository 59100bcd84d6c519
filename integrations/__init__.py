"""Adapters that let other projects use nexus_ext; none is imported unless it is asked for."""
