"""Pre-train decoder language models by growing them."""

__version__ = "0.1.0"
