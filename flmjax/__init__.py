"""Pre-train decoder language models by growing them."""
