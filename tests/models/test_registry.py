import inspect
import pickle

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from knlightning import models
from knlightning.analysis.paper import ROWS
from knlightning.models import list_models
from knlightning.nn.normalization import NORMS

MODELS = {model.name: model for model in list_models()}
CHOOSING = [name for name, model in MODELS.items() if model.norm]
ORDER = ["num_classes", "norm", "activation", "low_resolution", "dropout_p", "eps", "eval_statistics", "weights"]
# 32 groups divide neither 16 nor 724, 843, 810, 696, 668, 625 or 458 channels, 2 groups none of 843, 201, 167, 625
INDIVISIBLE = {
    "knresnet8": {"group"},
    "knresnet18": {"group"},
    "knresnet34": {"group", "local_context"},
    "knresnet50": {"group", "local_context"},
    "knresnet101": {"group"},
    "knresnet152": {"group", "local_context"},
    "fcn_knresnet18": {"group", "local_context"},
    "fcn_knresnet50": {"group"},
}


def test_every_network_of_the_public_interface_is_on_the_list():
    families = ("resnet", "convnext", "densenet", "vgg")
    makers = [name for name in models.__all__ if name.islower() and any(family in name for family in families)]
    assert sorted(makers) == sorted(MODELS)
    assert all(getattr(models, name) is model.make for name, model in MODELS.items())
    assert [model.name for model in list_models()] == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_arguments_are_by_keyword_in_one_order_and_described(name):
    make = MODELS[name].make
    parameters = inspect.signature(make).parameters
    assert list(parameters) == [argument for argument in ORDER if argument in parameters]
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert name not in CHOOSING or ORDER[:-1] == list(parameters)[:7]
    assert name not in ("convnext_tiny",) or list(parameters) == ["num_classes"]
    described = inspect.getdoc(make)
    assert [argument for argument in parameters if f"\n    {argument}: " not in described] == []
    assert described.count("Args:") == described.count("Raises:") == 1
    assert pickle.loads(pickle.dumps(make)) is make


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.endswith("152")) for n in CHOOSING])
def test_norms_are_those_whose_groups_divide_the_channels(name):
    assert set(MODELS[name].norms) == set(NORMS) - INDIVISIBLE.get(name, set())


def test_tables_are_those_of_the_paper():
    published = {}
    for row in ROWS:
        published.setdefault(row.backbone, set()).add(row.table)
    assert published == {name: set(model.tables) for name, model in MODELS.items() if model.tables}


def test_an_entry():
    model = MODELS["knresnet18"]
    assert model.make is models.knresnet18
    assert (model.task, model.norm, model.images) == ("classification", "kernel", "large, small")
    assert model.num_parameters == 11_685_220
    assert "ImageNet" in model.weights
    assert model.defaults["dropout_p"] == 0.05
    assert MODELS["resnet8"].images == "small, large"
    assert MODELS["fcn_resnet18"].task == "segmentation"
    assert (MODELS["convnext_tiny"].norm, MODELS["convnext_tiny"].norms) == (None, ())


def parse(*args):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    return parser.parse_args(args).network.init_args


def test_configurations_see_the_arguments():
    given = parse("--network=knlightning.models.fcn_knresnet8", "--network.norm=group", "--network.eps=0.1")
    assert given.as_dict() == {
        "num_classes": 11,
        "norm": "group",
        "activation": "relu",
        "low_resolution": True,
        "dropout_p": 0.0,
        "eps": 0.1,
        "eval_statistics": "expected",
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--network.nrom=group", "Option 'nrom' is not accepted"),
        ("--network.norm=groups", "Got value: groups"),
        ("--network.num_classes=ten", "ten"),
    ],
)
def test_wrong_configurations(wrong, message):
    with pytest.raises(ArgumentError, match=message):
        parse("--network=knlightning.models.resnet18", wrong)
