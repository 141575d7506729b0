"""What a checkpoint folder holds, matrix by matrix, and whether a compressed one is what it says it is."""
