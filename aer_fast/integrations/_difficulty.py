"""Difficulty as the logs of the trainers know it."""

# Prompts by accuracy, the share of their rollouts that are right: from the first number on, below the second.
BINS = {"hard": (0.0, 1 / 3), "medium": (1 / 3, 2 / 3), "easy": (2 / 3, float("inf"))}
