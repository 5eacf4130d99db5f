"""TQ1_0 and TQ2_0: super-blocks of 256 codes in {-1, 0, 1} (TQ2_0 also decodes +2) with one float16 scale."""
