"""Language models in their roles: policy, critic, reward model, reference."""
