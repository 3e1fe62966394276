"""Where white-box attacks get their gradients: a checkpoint's model, or an ONNX file as a torch module."""
