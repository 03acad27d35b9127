"""Evaluation of models: suite → runner → records → table, plots and report."""
