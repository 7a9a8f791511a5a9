"""RLHF in one tool: SFT -> sample -> label -> reward model -> PPO -> evaluate -> report."""

__version__ = "0.1.0"
