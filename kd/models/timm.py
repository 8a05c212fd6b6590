"""Any classifier of timm (PyTorch image models), with fresh weights or those that timm publishes. Needs kd[timm]."""

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import field_validator
from torch import nn

from kd.core.errors import UserError
from kd.models.wrapped import ExternalModelConfig, Wrapped, check_known_name, pretrained_state


class TimmConfig(ExternalModelConfig):
    name: Literal["timm"]

    @field_validator("model")
    @classmethod
    def _known(cls, model: str) -> str:
        if find_spec("timm") is None:
            raise ValueError("the package timm is not installed; pip install 'kd[timm]'")
        import timm

        architecture = check_known_name(model.partition(".")[0], timm.list_models())
        return check_known_name(
            model, [architecture, *timm.list_models(f"{architecture}.*", pretrained=True)]
        )


class Timm(Wrapped):
    """Taps: the modules of the network by name (layer1, blocks.3, stages.0), pool and head; see `Wrapped`.

    Published weights are loaded but for the classifier, which is new. Images are normalised as the data set says.
    """

    Config = TimmConfig

    def __init__(self, config: TimmConfig, classes: int, size: int):
        import timm

        published = timm.get_pretrained_cfg(config.model)
        fixed = published is not None and published.fixed_input_size
        sized: dict[str, Any] = {"img_size": size} if fixed else {}

        def make(pretrained: bool = False) -> nn.Module:
            return timm.create_model(
                config.model, pretrained=pretrained, num_classes=classes, **sized
            )

        def filled() -> nn.Module:
            if not timm.is_model_pretrained(config.model):
                raise UserError(f"pretrained: timm has no weights of {config.model}")
            return make(pretrained=True)

        super().__init__(
            pretrained_state(filled, config.model) if config.pretrained else make, size
        )
