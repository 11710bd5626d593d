"""Train a tiny model with qat in FSDP2 and as a whole, and compare; torchrun starts it twice."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_models import tiny_model

from attnimg.config.schema import Qat
from attnimg.fake_quantization import turn_fake_quantizers
from attnimg.train.qat import simulate_quantization


def main() -> None:
    """Train both for three steps."""
    dist.init_process_group("gloo")
    settings = Qat(weight_dtype="int4", activation_dtype="int8", group_size=16)
    tokens = torch.arange(3, 43).view(2, 20)
    whole, sharded = tiny_model("llama"), tiny_model("llama")
    for model in (whole, sharded):
        simulate_quantization(model, settings, dtype="float32")
        assert turn_fake_quantizers(model, on=True) == 30
    for layer in (*sharded.model.layers, sharded):
        fully_shard(layer)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (whole, sharded)]
    for _ in range(3):
        losses = [model(input_ids=tokens, labels=tokens).loss for model in (whole, sharded)]
        assert torch.equal(*losses), losses
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    full = {name: weight.full_tensor() for name, weight in sharded.state_dict().items()}
    assert all(torch.equal(full[name], weight) for name, weight in whole.state_dict().items())
    if dist.get_rank() == 0:
        sys.stdout.write("the same losses and weights\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
