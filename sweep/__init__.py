"""Presets x seeds x budgets x variants: `python -m sweep.run`, and the ranking of its results."""
