"""The training step, its optimizer and objective, the loop around it, and the state that checkpoints save."""
