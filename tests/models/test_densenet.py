import torch
import torchvision

from knlightning.models import densenet121


def test_number_of_parameters_is_that_of_torchvision():
    with torch.device("meta"):
        models = densenet121(), torchvision.models.densenet121()
    assert {sum(p.numel() for p in model.parameters()) for model in models} == {7_978_856}


def test_weights_of_torchvision_give_its_outputs():
    torch.manual_seed(0)
    theirs, ours = torchvision.models.densenet121(num_classes=5), densenet121(num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 33, 34)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_hooks_may_watch_the_last_norm():
    model = densenet121(num_classes=2, norm="layer", low_resolution=True)
    seen = []
    model.features.norm5.register_full_backward_hook(lambda *_: seen.append(True))
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    assert seen
