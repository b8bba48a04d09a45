"""README's picture: `python docs/picture.py FOLDER [--weights NAME|PATH] [-o docs/features.png]`.

Features of the images of FOLDER/CLASS (any nesting; files named *_mask* are left out) from random and from pretrained
weights of the same architecture, laid out in two dimensions by t-SNE, and the share of images whose nearest other image
is of the same class. Wants `pip install '.[train]'`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.manifold import TSNE  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import uscl_hub  # noqa: E402

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif")


def find_images(folder: Path) -> tuple[list[Path], np.ndarray]:
    """Images below FOLDER/CLASS, sorted, and the class of each."""
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in ENDINGS and "_mask" not in p.stem]
    if not paths:
        sys.exit(f"{folder}: holds no images; name a folder with a folder for each class")
    return paths, np.array([p.relative_to(folder).parts[0] for p in paths])


@torch.inference_mode()
def features(model: torch.nn.Module, paths: list[Path]) -> np.ndarray:
    """float32 (N, channels), each channel standardised."""
    transform = uscl_hub.create_transform(model)
    rows = [model(torch.stack([transform(Image.open(p)) for p in paths[i : i + 32]])) for i in range(0, len(paths), 32)]
    return StandardScaler().fit_transform(torch.cat(rows).numpy())


def neighbours_agree(x: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose nearest other row, by cosine, has the same label."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    return float(np.mean(labels[similarity.argmax(1)] == labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with a folder for each class")
    parser.add_argument("--weights", help="released tag, exported folder or file (default: the default release)")
    parser.add_argument("--name", default="meta_uscl_resnet18", help="model (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/features.png"))
    args = parser.parse_args()
    paths, labels = find_images(args.folder)
    trained = uscl_hub.load_meta_uscl_backbone(args.name, checkpoint=args.weights).eval()
    torch.manual_seed(0)
    untrained = timm.create_model(args.name, pretrained=False, pretrained_cfg=trained.pretrained_cfg).eval()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, (title, model) in zip(axes, {"random weights": untrained, "pretrained": trained}.items()):
        x = features(model, paths)
        points = TSNE(init="pca", random_state=0, perplexity=min(30, len(x) / 4)).fit_transform(x)
        for name in sorted(set(labels)):
            axis.scatter(*points[labels == name].T, s=6, label=name, linewidths=0)
        axis.set(xticks=[], yticks=[])
        axis.set_title(
            f"{title}\nnearest other image has the same class: {neighbours_agree(x, labels):.0%}", fontsize=10
        )
    axes[0].legend(fontsize=8, markerscale=2)
    figure.savefig(args.output, dpi=100)
    print(f"{args.output}: {len(paths)} images")


if __name__ == "__main__":
    main()
