"""Audits of deployed engines: attacks, corruptions and comparisons as durable jobs with statistical gates."""
