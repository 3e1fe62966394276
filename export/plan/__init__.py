"""What the build of a TensorRT plan needs: its parser, its progress, its log, its timings."""
