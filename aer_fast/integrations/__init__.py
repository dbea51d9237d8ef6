"""The fused loss and AER in other trainers. `import aer_fast` imports nothing of this package."""
