"""The wire: Open Inference Protocol (`inference`) and our audit API (`audit/v1`); code is generated at build time."""
