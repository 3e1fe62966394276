"""Version 1 of the audit API."""
