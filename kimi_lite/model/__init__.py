"""The model: its configuration, its layers, and the batch that one step runs through them."""
