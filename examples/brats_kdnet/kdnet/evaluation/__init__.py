"""Scores of held-out cases, and the label maps behind them."""
