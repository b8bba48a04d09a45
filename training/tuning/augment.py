"""Mild augmentation for ultrasound: left and right, a few degrees, a little size, gain and contrast; never upside down,
because depth is an axis of its own."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

GEOMETRY = v2.Compose(
    [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.85, 1.15), interpolation=InterpolationMode.BILINEAR),
    ]
)
GAIN = v2.ColorJitter(brightness=0.25, contrast=0.25)


def augment(images: torch.Tensor, masks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 (B, px, px) and bool (B, px, px) or None -> the same, every image by its own draw (torch's generator)."""
    pictures, outlines = [], []
    for i, image in enumerate(images):
        if masks is None:
            picture = GEOMETRY(tv_tensors.Image(image[None]))
        else:
            picture, outline = GEOMETRY(tv_tensors.Image(image[None]), tv_tensors.Mask(masks[i : i + 1].byte()))
            outlines.append(outline[0].bool())
        pictures.append(GAIN(picture)[0])
    return torch.stack(pictures), torch.stack(outlines) if outlines else None
