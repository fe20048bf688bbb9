import pytest
import torch
from privacy.micro_batches import check
from torch import nn

from knlightning.privacy.embedding import Embedded


class Dictionary(nn.Module):
    """So large a table that its gradients are kept in factors, and one row several times."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 3)

    def forward(self, x):
        return self.table(x.abs().long())


@pytest.mark.parametrize("views", [1, 2])
def test_large_tables_equal_micro_batches(views):
    check(Dictionary().double(), torch.randint(5, (4, 2, 3)).double(), views=views)


def test_rounding_of_gradients_that_cancel_is_allowed_for():
    """They are added in another order for a sum than for a norm."""
    grad = torch.tensor([[[1e4], [1.0], [-1e4]]])
    embedded = Embedded(torch.zeros(9, 1), torch.zeros(1, 3, dtype=torch.long), grad)
    norm = embedded.squared_norms().sqrt()
    assert 1.0 + 1e-3 < norm < 1.1
    assert norm >= embedded.weighted_sum(torch.ones(1)).norm()
