"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32 integer codes with a float16 scale, some with a minimum."""
