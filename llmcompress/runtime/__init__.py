"""Reading compressed checkpoints back to run them."""
