"""Rollouts: sampling them, keeping them, scoring them."""
