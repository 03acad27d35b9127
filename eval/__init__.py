"""How models are compared: suite → runner → records → table, plots and report."""
