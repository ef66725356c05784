"""Comparisons with other libraries; each skips where its peer is not installed."""
