"""The vision tower: what an image or a few frames of a video become before the model reads them."""
