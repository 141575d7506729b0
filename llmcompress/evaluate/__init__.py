"""What a compressed model is still worth."""
