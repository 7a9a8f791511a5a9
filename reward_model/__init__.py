"""Reward models: labeling of preferences, losses, training, ensembles and calibration."""
