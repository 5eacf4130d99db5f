"""Models of a hub: what a repository offers and whether it fits this machine, fetched into the cache that all programs
of the hub share, and found again where any of them keeps its files.

`huggingface_hub` (the extra `pull`) is imported where the network is used, and only there.
"""
