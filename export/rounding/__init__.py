"""fp16 and int8: how graphs are rounded, and on which ranges."""
