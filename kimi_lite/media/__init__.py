"""Images and videos from anywhere to patches for the vision tower: decoded in a process of its own, resized and padded
by the published rule."""
