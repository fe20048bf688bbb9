"""Experiments over several runs, and what they show."""
