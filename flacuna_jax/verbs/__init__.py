"""What the verbs do. Their command lines are the modules of the same names above, which import these on use."""
