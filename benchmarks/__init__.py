"""Comparative studies of optimizers: problems, methods, runs that resume, and reports."""
