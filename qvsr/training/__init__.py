"""Training of the small backbone: photographs, simulated motion, losses and the loop."""
