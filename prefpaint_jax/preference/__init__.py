"""Human preference: simulated annotators, the fit of the reward model, and its error bound."""
