"""Any classifier of torchvision, with new weights or those published for ImageNet."""

from typing import Any, Literal

from pydantic import field_validator
from torch import nn
from torchvision import models as zoo

from kd.core.errors import UserError
from kd.models.wrapped import ExternalModelConfig, Wrapped, check_known_name, pretrained_state

AUXILIARY_CLASSIFIERS = {"googlenet", "inception_v3"}  # these also return auxiliary logits


class TorchVisionConfig(ExternalModelConfig):
    """The keys of a torchvision model."""

    name: Literal["torchvision"]

    @field_validator("model")
    @classmethod
    def _is_known(cls, model: str) -> str:
        if model in AUXILIARY_CLASSIFIERS:
            raise ValueError(
                f"{model} has auxiliary classifiers, which kd does not train; choose another model"
            )
        return check_known_name(model, set(zoo.list_models(module=zoo)) - AUXILIARY_CLASSIFIERS)


class TorchVision(Wrapped):
    """A classifier of torchvision.

    Taps: the network's modules by name (layer1, layer4.1, features.3), pool and head; see
    `Wrapped`. Pretrained weights are loaded except for the classifier, which is new. Images are
    normalised by the mean and std of the data set.
    """

    Config = TorchVisionConfig

    def __init__(self, config: TorchVisionConfig, classes: int, size: int):
        takes_size = config.model.startswith("vit_")
        size_arguments: dict[str, Any] = {"image_size": size} if takes_size else {}

        def create() -> nn.Module:
            net: nn.Module = zoo.get_model(
                config.model, weights=None, num_classes=classes, **size_arguments
            )
            return net

        def create_pretrained() -> nn.Module:
            return _load_published(create(), config.model)

        make = pretrained_state(create_pretrained, config.model) if config.pretrained else create
        super().__init__(make, size)


def _load_published(net: nn.Module, model: str) -> nn.Module:
    """Load the published weights into `net`, except for its classifier.

    Raises:
        UserError: More than the classifier differs in shape.
    """
    weights: dict[str, Any] = zoo.get_model_weights(model).DEFAULT.get_state_dict(
        progress=False, check_hash=True
    )
    state = net.state_dict()
    matching = {
        name: tensor
        for name, tensor in weights.items()
        if name in state and state[name].shape == tensor.shape
    }
    unmatched = set(state) - set(matching)
    unmatched_modules = {name.rpartition(".")[0] for name in unmatched}
    if len(unmatched_modules) > 1 or any(name.endswith("pos_embedding") for name in unmatched):
        raise UserError(
            f"pretrained: the published weights of {model} do not fit images of this size"
        )
    net.load_state_dict(matching, strict=False)
    return net
