"""What a run would need, from the real compiler: for hardware that is here, and for hardware that is not."""
