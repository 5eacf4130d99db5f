"""ik_llama.cpp's IQ2_K to IQ6_K, IQ2_KS to IQ5_KS, IQ4_KSS and IQ2_KL: codes that stand for values of one of two
tables."""
