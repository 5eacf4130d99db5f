"""F32, F16, BF16: plain numbers."""
