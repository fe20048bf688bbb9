import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from knlightning.checks import ArgumentError
from knlightning.models import list_models

MODELS = {model.name: model for model in list_models()}
# large networks are built of the same blocks as the small ones, and take seconds to be made
NAMES = [
    pytest.param(
        name, marks=[pytest.mark.slow] if name.endswith(("16", "18", "34", "50", "101", "121", "152", "tiny")) else []
    )
    for name in MODELS
]


def build(name):
    small = {"low_resolution": True} if "low_resolution" in MODELS[name].defaults else {}
    return MODELS[name].make(num_classes=7, **small).eval(), torch.rand(2, 3, *((17, 17) if small else (33, 33)))


@pytest.mark.parametrize("name", [name for name in NAMES if MODELS[name.values[0]].task == "classification"])
def test_features_and_another_last_layer(name):
    model, images = build(name)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape[:2] == (2, model.num_features)
        assert features.dim() == 4
        before = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.get_classifier()(before), model(images))
        assert before.shape == (2, model.head_hidden_size)
        for num_classes in (3, 0, 5):
            model.reset_classifier(num_classes)
            logits = model(images)
            assert logits.shape == ((2, num_classes) if num_classes else before.shape)
            if not num_classes:
                torch.testing.assert_close(logits, before)
    with pytest.raises(ArgumentError, match="num_classes must be a whole number at least 0, got -1"):
        model.reset_classifier(-1)


def test_new_layer_has_the_type_of_the_network():
    model = MODELS["knresnet8"].make().double()
    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.fc.weight.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_features_of_every_network_are_extracted_by_torchvision(name):
    model, images = build(name)
    nodes = get_graph_node_names(model)[1]
    middle = next(node for node in nodes[len(nodes) // 2 :] if not node.endswith(("weight", "bias", "layer_scale")))
    extractor = create_feature_extractor(model, [middle, nodes[-1]])
    with torch.no_grad():
        features, last = extractor(images).values()
        torch.testing.assert_close(last, model(images))
    assert features.shape[0] == 2
    assert extractor.train()(images).popitem()[1].requires_grad
