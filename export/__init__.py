"""Checkpoint (or anybody's ONNX) -> engines with proof of parity, in a versioned model repository."""
