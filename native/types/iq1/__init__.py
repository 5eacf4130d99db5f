"""IQ1_S and IQ1_M: points of 8 weights in {-1, 0, 1}, all plus or minus 1/8."""
