"""Learn from preferences between answers, with TRL's trainers: rl: dpo, ipo, orpo and kto.

records -> data -> batches -> trainer; log_probs compares TRL's head with the model's own logits.
"""
