"""Supervised fine-tuning below its stage: batches, the trainer, its checkpoints."""
