"""Preference labels: who judged which pair how, and what the judgments say together."""
