"""IQ4_NL, IQ4_XS, MXFP4, NVFP4: codes of 4 bits that stand for sixteen values."""
