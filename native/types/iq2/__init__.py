"""IQ2_XXS, IQ2_XS, IQ2_S: points of 8 weights with signs."""
