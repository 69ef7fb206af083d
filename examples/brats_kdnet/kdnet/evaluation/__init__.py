"""Scores of held-out cases: per-case metrics, paired statistics, tables."""
