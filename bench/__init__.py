"""Benchmarks: `python -m bench model` measures, `python -m bench report` puts what was measured into the README."""
