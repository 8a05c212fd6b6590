"""Any classifier of timm (PyTorch image models), with new or pretrained weights. Needs timm."""

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import field_validator
from torch import nn

from kd.core.errors import UserError
from kd.models.wrapped import ExternalModelConfig, Wrapped, check_known_name, pretrained_state


class TimmConfig(ExternalModelConfig):
    """The keys of a timm model."""

    name: Literal["timm"]

    @field_validator("model")
    @classmethod
    def _is_known(cls, model: str) -> str:
        if find_spec("timm") is None:
            raise ValueError("the package timm is not installed; pip install -e '.[timm]'")
        import timm

        architecture = check_known_name(model.partition(".")[0], timm.list_models())
        pretrained = timm.list_models(f"{architecture}.*", pretrained=True)
        return check_known_name(model, [architecture, *pretrained])


class Timm(Wrapped):
    """A classifier of timm.

    Taps: the network's modules by name (layer1, blocks.3, stages.0), pool and head; see `Wrapped`.
    Pretrained weights are loaded except for the classifier, which is new. Images are normalised by
    the mean and std of the data set.
    """

    Config = TimmConfig

    def __init__(self, config: TimmConfig, classes: int, size: int):
        import timm

        pretrained_config = timm.get_pretrained_cfg(config.model)
        fixed_size = pretrained_config is not None and pretrained_config.fixed_input_size
        size_arguments: dict[str, Any] = {"img_size": size} if fixed_size else {}

        def create(pretrained: bool = False) -> nn.Module:
            return timm.create_model(
                config.model, pretrained=pretrained, num_classes=classes, **size_arguments
            )

        def create_pretrained() -> nn.Module:
            if not timm.is_model_pretrained(config.model):
                raise UserError(f"pretrained: timm has no weights of {config.model}")
            return create(pretrained=True)

        make = pretrained_state(create_pretrained, config.model) if config.pretrained else create
        super().__init__(make, size)
