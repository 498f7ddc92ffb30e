"""Benchmarks: `python -m bench model` measures, `python -m bench report` prints what was measured."""
