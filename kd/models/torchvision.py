"""Any classifier of torchvision, with fresh weights or those that torchvision publishes for ImageNet."""

from typing import Any, Literal

from pydantic import field_validator
from torch import nn
from torchvision import models as zoo

from kd.core.errors import UserError
from kd.models.wrapped import ExternalModelConfig, Wrapped, check_known_name, pretrained_state

EXTRA_ARGUMENTS = {"googlenet", "inception_v3"}  # their forward pass gives auxiliary logits as well


class TorchVisionConfig(ExternalModelConfig):
    name: Literal["torchvision"]

    @field_validator("model")
    @classmethod
    def _known(cls, model: str) -> str:
        if model in EXTRA_ARGUMENTS:
            raise ValueError(
                f"{model} has auxiliary classifiers, which kd does not train; choose another"
            )
        return check_known_name(model, set(zoo.list_models(module=zoo)) - EXTRA_ARGUMENTS)


class TorchVision(Wrapped):
    """Taps: the modules of the network by name (layer1, layer4.1, features.3), pool and head; see `Wrapped`.

    Published weights are loaded but for the classifier, which is new. Images are normalised as the data set says.
    """

    Config = TorchVisionConfig

    def __init__(self, config: TorchVisionConfig, classes: int, size: int):
        sized: dict[str, Any] = {"image_size": size} if config.model.startswith("vit_") else {}

        def make() -> nn.Module:
            return zoo.get_model(config.model, weights=None, num_classes=classes, **sized)

        def published() -> nn.Module:
            return _load_published(make(), config.model)

        super().__init__(
            pretrained_state(published, config.model) if config.pretrained else make, size
        )


def _load_published(net: nn.Module, model: str) -> nn.Module:
    """`net` with the published weights, but for its classifier. **Raises:** UserError."""
    weights: dict[str, Any] = zoo.get_model_weights(model).DEFAULT.get_state_dict(
        progress=False, check_hash=True
    )
    own = net.state_dict()
    fit = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and own[name].shape == tensor.shape
    }
    new = {name.rpartition(".")[0] for name in own if name not in fit}
    if len(new) > 1 or any(name.endswith("pos_embedding") for name in set(own) - set(fit)):
        raise UserError(
            f"pretrained: the published weights of {model} do not fit images of this size"
        )
    net.load_state_dict(fit, strict=False)
    return net
