"""Attacks, and the search that each makes: every query counted, every success decided on the target."""
