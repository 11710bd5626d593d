"""Train on preferences between answers with TRL's trainers, for rl: dpo, ipo, orpo and kto.

records -> data -> batches -> trainer; log_probs compares TRL's head with the model's own logits.
"""
