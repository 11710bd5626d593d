"""flex_attention on a CPU, where it has no backward pass: right going forward, packed too."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from attnimg.backends import find_backend
from attnimg.backends._transformers import attention_function
from attnimg.layout import lay_out

LENGTHS = (13, 21, 10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # what torch.compile says of a small machine
def test_packed_documents_get_the_logits_they_get_alone() -> None:
    backend = find_backend("flex_attention")
    assert backend is not None
    assert attention_function(backend) is not None
    model = tiny_model("llama", "flex_attention").eval()
    torch.manual_seed(0)
    documents = [torch.randint(3, 128, (1, length)) for length in LENGTHS]
    layout = lay_out([list(LENGTHS)], padding_free=True)
    with torch.no_grad():
        apart = [model(input_ids=ids, use_cache=False).logits for ids in documents]
        packed = model(
            input_ids=torch.cat(documents, dim=1),
            position_ids=torch.as_tensor(layout.position_ids),
            use_cache=False,
        ).logits
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), atol=1e-5, rtol=1e-5)
