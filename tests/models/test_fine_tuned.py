import pytest
import timm
import torch
from torch import nn

from knlightning.models import fine_tuned, knresnet8, resnet8
from knlightning.models.lora import LoRA


def trained(net):
    return {name.rpartition(".")[0] for name, p in net.named_parameters() if p.requires_grad}


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    net = resnet8(num_classes=10, norm="batch")
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 1, 2)
    return net.eval()


def test_the_frozen_network_computes_the_same_features(resnet):
    x, features = torch.rand(2, 3, 32, 32), {}
    resnet[9].register_forward_hook(lambda module, args, output: features.setdefault(len(features), output))
    resnet(x)
    assert fine_tuned(resnet, 7, train=["6.1", "0.0.weight"]) is resnet
    assert resnet.train()(x).shape == (2, 7)  # in training, too, by the statistics of before
    torch.testing.assert_close(features[1], features[0])
    assert trained(resnet) == {"0.0", "6.1.0", "11"}


def test_all_or_nothing_but_the_head(resnet):
    assert trained(fine_tuned(resnet, 3)) == {"11"}
    net = fine_tuned(knresnet8(num_classes=10), 3, train=None)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_lora_is_trained_with_the_head():
    net = fine_tuned(
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=3), 3, lora_rank=2
    )
    assert {name.rpartition(".")[2] for name in trained(net) - {"head"}} == {"down", "up"}
    assert sum(isinstance(module, LoRA) for module in net.modules()) == 4


def test_weights_come_from_a_file(tmp_path):
    source, path = knresnet8(num_classes=10), str(tmp_path / "weights.pt")
    torch.save(source.state_dict(), path)
    net = fine_tuned(knresnet8(num_classes=10), 3, path)
    assert torch.equal(net.stem[0].weight, source.stem[0].weight)


def test_what_does_not_fit_is_named(tmp_path, resnet):
    path = str(tmp_path / "weights.pt")
    torch.save(resnet.state_dict(), path)
    with pytest.raises(ValueError, match=r"(?s)does not fit this KNResNet; .*missing: stem"):
        fine_tuned(knresnet8(), 3, path)
    with pytest.raises(ValueError, match="nothing with parameters is named layer9; it has 0, 1, "):
        fine_tuned(resnet, 3, train=["layer9", "0"])
    with pytest.raises(ValueError, match="has no linear layer"):
        fine_tuned(nn.Sequential(nn.Conv2d(3, 3, 1)), 3)
    with pytest.raises(ValueError, match=r"0 \(BatchNorm1d\) cannot be frozen: use timm.*freeze_batch_norm_2d"):
        fine_tuned(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), 3)
