"""Inference: requests -> tensors -> batches -> engines, and back."""
