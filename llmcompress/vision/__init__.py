"""Convolutional networks through the same core: what a convolution needs beyond `core` and `methods`, and no more."""
