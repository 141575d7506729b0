"""Tensors only: statistics, grids, masks, salience and the optimal-brain sweep. Nothing of Hugging Face."""
