"""Losses as functions and as terms, and the algebra of terms. Nothing here knows the wrapper."""
