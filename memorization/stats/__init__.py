"""Intervals and tests: of a ratio, of EMM, and of a ratio that is looked at while it grows."""
