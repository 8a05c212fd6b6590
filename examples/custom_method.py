"""Train with a loss of your own, here the regression of logits of Ba and Caruana (2014).

python examples/custom_method.py --config-dir examples/conf method=mse data=digits
python examples/custom_method.py --config-dir examples/conf -m method=mse,logits data=digits
"""

from typing import Literal

import torch.nn.functional as F

from kd import cli, methods
from kd.methods import Batch, Method, ModelOutput, Terms, WeightedConfig, cross_entropy


class MSEConfig(WeightedConfig):
    """The keys of examples/conf/method/mse.yaml: `alpha`, `beta` and the name."""

    name: Literal["mse"]


# Outside of `if __name__ == "__main__"`, so that the worker processes of a sweep know it as well
@methods.register
class MSE(Method):
    """loss = alpha * CE + beta * mean of (student logit - teacher logit)^2."""

    Config = MSEConfig

    def forward(self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None) -> Terms:
        assert teacher is not None
        difference = F.mse_loss(student.logits, teacher.logits)
        return {
            "hard": (self.config.alpha, cross_entropy(batch, student)),
            "difference": (self.config.beta, difference),
        }


if __name__ == "__main__":
    cli.main()
