"""The reliability checks: one function each, named for its code (service.audit.checks runs them)."""
