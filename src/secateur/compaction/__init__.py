"""From closed units to a smaller plain module: mask, cut, proof, and the file that keeps it."""
