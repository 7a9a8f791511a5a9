"""One process of the transformer experiment, started by a launcher; rank 0 prints the distance to the optimum.

accelerate launch --config_file launch/cpu_zero2.yaml tests/closed_form/sharded_run.py ROWS_PER_PROCESS
"""

import sys

import torch
from token_mdp import TokenMDP, ppo_config, run_ppo, tiny_llama

if __name__ == "__main__":
    rows = int(sys.argv[1])
    transformer = {"steps": 60, "optim": {"lr": 0.003, "betas": (0.8, 0.95), "schedule": "cosine"}, "critic_lr": 0.003}
    experiment = run_ppo(TokenMDP(), ppo_config(batch_size=rows, micro_batch_size=rows, **transformer), *tiny_llama())
    distance = experiment.distance  # all ranks: ZeRO-3 brings the weights together
    if torch.distributed.get_rank() == 0:
        print(f"distance {distance}")
