import copy

import pytest
import timm
import torch
from privacy.micro_batches import check
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from knlightning.models import LoRA, add_lora


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(4, 3), (2, 4)), (nn.Conv2d(4, 3, 1, 2, 1, bias=False), (4, 5, 3))]
)
def test_begins_as_the_layer_and_adds_a_product_of_low_rank(layer, shape):
    torch.manual_seed(0)
    lora, x = LoRA(layer.double(), 2, alpha=6.0), torch.randn(5, *shape, dtype=torch.float64)
    assert torch.equal(lora(x), layer(x))
    nn.init.normal_(lora.up.weight)
    change = 3.0 * (lora.up.weight.flatten(1) @ lora.down.weight.flatten(1))
    whole = copy.deepcopy(layer)
    whole.weight.data.add_(change.view_as(whole.weight))
    torch.testing.assert_close(lora(x), whole(x))
    assert [name for name, p in lora.named_parameters() if p.requires_grad] == ["down.weight", "up.weight"]
    check(lora, x)  # the gradients of single samples


def test_attention_that_hands_its_weights_to_functions_is_left():
    net = nn.Sequential(
        VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3), SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3)
    )
    names = add_lora(net, 2, but=[net[0].heads])
    of_vit = [f"0.encoder.layers.encoder_layer_0.mlp.{number}" for number in (0, 3)]
    assert names == [
        *of_vit,
        *(f"1.features.1.{block}.mlp.{number}" for block in (0, 1) for number in (0, 3)),
        "1.head",
    ]
    assert add_lora(net, 2, but=[net[0].heads]) == []
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=3, num_classes=3)
    names = add_lora(net, 1)
    assert names == [*(f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")), "head"]
    net(torch.rand(2, 3, 32, 32)).sum().backward()


def test_other_layers_and_ranks_are_refused():
    with pytest.raises(ValueError, match=r"a linear layer, or a convolution of 1x1 in one group, got Conv2d\("):
        LoRA(nn.Conv2d(4, 4, 1, groups=2), 2)
    with pytest.raises(ValueError, match="rank must be a whole number at least 1, got 0"):
        LoRA(nn.Linear(2, 2), 0)
