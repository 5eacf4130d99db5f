"""Q1_0, Q2_0 and LITE2_128: long blocks of one- and two-bit codes with one float16 scale."""
