"""Q1_0 and Q2_0: long blocks of one- and two-bit codes with one float16 scale."""
