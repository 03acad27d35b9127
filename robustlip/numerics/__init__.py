"""Rounding error bounds, enclosures of matrices and guaranteed spectral norms. No file here depends on layers."""
