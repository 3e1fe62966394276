"""Parts of ONNX graphs: reading, pruning, preparing them."""
