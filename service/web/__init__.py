"""The dashboard: a client of the gRPC API like any other."""
