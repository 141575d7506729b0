"""What is known about networks: where their blocks are, which matrices read one tensor, which norm wrote it."""
