"""verl: the per-prompt entropy coefficient, and the fused kernel behind its switch."""
