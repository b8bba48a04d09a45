"""The U-Net of `uscl_hub.unet` on a backbone's weights, with its layers as the decay of the learning rate has them."""

import timm
import torch
from timm.models import group_parameters

from uscl_hub.errors import UserError
from uscl_hub.unet import UNet


class LayeredUNet(UNet):
    """A UNet that tells timm which layer a parameter belongs to. levels: of the encoder's parameters, by flat name."""

    def __init__(self, encoder: torch.nn.Module, outputs: int, levels: dict[str, int]):
        super().__init__(encoder, outputs)
        self.levels = levels

    def group_matcher(self, coarse: bool = False):
        """Layer of a parameter by its name, as timm's layer decay asks for it: the decoder comes last."""
        top = max(self.levels.values()) + 1
        return lambda name: self.levels[flat(name.removeprefix("encoder."))] if name.startswith("encoder.") else top

    def no_weight_decay(self):
        return set()


def flat(name: str) -> str:
    """timm's features_only models may flatten names: stages.0 is stages_0."""
    return name.replace(".", "_")


def build(architecture: str, model: torch.nn.Module, outputs: int = 1) -> LayeredUNet:
    """A U-Net whose encoder has the weights of `model`, a timm model of that architecture.

    Raises UserError if the architecture has no feature maps of halving size.
    """
    try:
        encoder = timm.create_model(architecture, features_only=True)
        strides = encoder.feature_info.reduction()
    except (RuntimeError, AttributeError, AssertionError, IndexError) as error:  # timm's ways to say no
        raise UserError(f"backbones: {architecture} gives no feature maps for segmentation ({error})") from error
    if len(set(strides)) < 3:
        raise UserError(f"backbones: {architecture} has feature maps at strides {strides}; a U-Net needs them to grow")
    state = {flat(key): value for key, value in model.state_dict().items()}
    encoder.load_state_dict({key: state[flat(key)] for key in encoder.state_dict()})
    groups = group_parameters(model, model.group_matcher(coarse=True))
    levels = {flat(name): level for level, names in groups.items() for name in names}
    return LayeredUNet(encoder, outputs, levels)
