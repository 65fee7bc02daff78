"""What people prefer: scores, the reward's fit, and the bound on its error."""
