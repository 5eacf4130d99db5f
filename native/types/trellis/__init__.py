"""IQ1_KT, IQ2_KT, IQ3_KT, IQ4_KT of ik_llama.cpp: weights are what a generator of pseudo-random numbers makes of an
index.

The generator multiplies a 32-bit state by MULTIPLIER (`layout`) and takes the sum of the low six bits of its four
bytes, minus 126: nearly normal, from -126 to 126. The first state of a group's weights is its index plus 4096.
"""
