"""What the reliability checks measure themselves (service.audit.checks decides)."""
