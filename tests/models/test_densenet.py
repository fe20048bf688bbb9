import torch
import torchvision

from knlightning.models import densenet121


def test_weights_of_torchvision_give_its_outputs():
    torch.manual_seed(0)
    theirs, ours = torchvision.models.densenet121(num_classes=5), densenet121(num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 33, 34)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
