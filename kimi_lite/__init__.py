"""kimi-lite: Kimi K2.5, a trillion-parameter mixture of experts, on one desk."""

__version__ = "0.1.0"
