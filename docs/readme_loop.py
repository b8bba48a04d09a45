"""The README's training loop as it stands (one epoch, AdamW 1e-4), scored by the folds of training/finetune.py, or on
other labels.

python docs/readme_loop.py DATA [--test OTHER] [--classes A B] [--folds 3] [--seed 0] [--backbone meta_uscl_resnet18]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import uscl_hub  # noqa: E402
from training.tuning import labels, problem, scores, search  # noqa: E402


def fit(images: torch.utils.data.Dataset, backbone: str, outputs: int) -> torch.nn.Module:
    """README, part (a)."""
    model = timm.create_model(backbone, pretrained=True, num_classes=outputs)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    for x, label in torch.utils.data.DataLoader(images, batch_size=32, shuffle=True):
        loss = torch.nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def samples_of(found, transform) -> tuple[uscl_hub.UltrasoundDataset, list]:
    """The files' images and the same, read once."""
    images = uscl_hub.UltrasoundDataset(found, transform)
    return images, [images[i] for i in range(len(images))]


@torch.inference_mode()
def predict(model: torch.nn.Module, samples: list) -> np.ndarray:
    """Probabilities, float (samples, classes)."""
    parts = np.array_split(np.arange(len(samples)), 16)
    return torch.cat([model(torch.stack([samples[i][0] for i in part])) for part in parts]).softmax(1).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--test", help="labels to be tested on once, after training on all of DATA")
    parser.add_argument("--classes", nargs="*", default=())
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", default="meta_uscl_resnet18")
    given = parser.parse_args()
    found = labels.read(given.data, "classification", classes=tuple(given.classes))
    transform = uscl_hub.create_transform(timm.create_model(given.backbone, pretrained=True))
    images, samples = samples_of(found, transform)
    torch.manual_seed(given.seed)
    if given.test:
        model = fit(samples, given.backbone, len(found.classes))
        found = labels.read(given.test, "classification", classes=found.classes)
        images, samples = samples_of(found, transform)
        said = predict(model, samples)
    else:
        fold_of = search.split(found, given.folds, given.seed)[images.item]
        said = np.zeros((len(samples), len(found.classes)))
        for fold in range(given.folds):
            torch.manual_seed(given.seed)
            model = fit([samples[i] for i in np.flatnonzero(fold_of != fold)], given.backbone, len(found.classes))
            said[fold_of == fold] = predict(model, [samples[i] for i in np.flatnonzero(fold_of == fold)])
    said = problem.pool(said, images.item, len(found.items))
    for name, e in scores.estimates(problem.describe(found), found.targets, said, found.groups).items():
        if name in ("AUROC", "macro-F1", "balanced accuracy"):
            print(f"{name} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]")


if __name__ == "__main__":
    main()
