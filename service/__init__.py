"""Serve and audit exported image classifiers."""
