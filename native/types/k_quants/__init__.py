"""Q2_K to Q6_K: super-blocks of 256 whose groups have quantized scales, some with minima."""
