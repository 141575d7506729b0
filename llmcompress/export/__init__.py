"""Writing what was compressed: the checkpoint folder and the formats of its tensors."""
