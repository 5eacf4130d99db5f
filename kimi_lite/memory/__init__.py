"""Where things lie: the weights of a GGUF file, the latent cache, the experts."""
