"""Train a byte-level model in plain PyTorch, with attnimg.attention on packed documents."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnimg

DATA = Path(__file__).parents[1] / "data" / "devils_dictionary.jsonl"
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16


class Block(nn.Module):
    """Self-attention and an MLP on packed tokens, (tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Return x after attention inside each document."""
        q, k, v = (
            self.qkv(self.norms[0](x))
            .unflatten(-1, (-1, HEAD_DIM))
            .split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        )
        attended = attnimg.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        x = x + self.out(attended.flatten(1))
        return x + self.mlp(self.norms[1](x))


def main() -> None:
    """Train for 40 steps on 4 documents per step."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # attnimg logs its choice
    torch.manual_seed(0)
    texts = [json.loads(line)["output"][:256] for line in DATA.open(encoding="utf-8")]
    embedding, head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
    blocks = nn.ModuleList([Block(), Block()])
    model = nn.ModuleList([embedding, blocks, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        documents = [torch.tensor(list(text.encode())) for text in texts[4 * step : 4 * step + 4]]
        lengths = [len(document) - 1 for document in documents]
        cu_seqlens, max_seqlen = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
        x = embedding(torch.cat([document[:-1] for document in documents]))
        for block in blocks:
            x = block(x, cu_seqlens, max_seqlen)
        loss = F.cross_entropy(head(x), torch.cat([document[1:] for document in documents]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 13 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
