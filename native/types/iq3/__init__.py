"""IQ3_XXS and IQ3_S: points of 4 weights with signs."""
