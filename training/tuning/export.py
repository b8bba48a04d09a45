"""The tuned model as a folder that plain timm loads, with where it comes from."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from training.engine.export import code_version, fingerprint, licences, made_from
from training.evaluation.backbones import Backbone
from training.evaluation.leaks import LONG
from training.messages import markdown
from training.tuning.network import Setting, plain
from uscl_hub.checkpoints import WEIGHTS_NAME, replace_folder
from uscl_hub.clips import content_hash
from uscl_hub.deploy import forget_paths
from uscl_hub.errors import UserError
from uscl_hub.files import sha256, write_whole
from uscl_hub.unet import UNet

ONNX_NAME = "model.onnx"
TOLERANCE = 1e-4  # of the largest logit, between ONNX and PyTorch


def write(folder: Path, model: torch.nn.Module, setting: Setting, result: dict) -> Path:
    """model.safetensors, config.json and README.md; an older export in `folder` is replaced file by file, its
    model.onnx is removed.

    Args:
        model: on the CPU.
        result: what the run reached, for the provenance: temperature, scores, crop, seed, ...

    Raises:
        CheckpointError: a weight is not finite; nothing is written.
    """
    (folder / ONNX_NAME).unlink(missing_ok=True)  # of the older weights: it must not be taken for one of these
    replace_folder(folder, model.state_dict(), partial(_config, setting, model, result), card)
    return folder


def _config(setting: Setting, model: torch.nn.Module, result: dict, digest: str) -> dict:
    backbone, problem = setting.backbone, setting.problem
    cfg = {k: v for k, v in backbone.model.pretrained_cfg.items() if k in KEPT}
    channels = 3
    cfg |= {
        "tag": "finetuned",
        "input_size": [channels, setting.pixels.px, setting.pixels.px],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": _channels(backbone.mean),
        "std": _channels(backbone.std),
        "num_classes": problem.outputs,
        "label_names": list(problem.names),
        "license": "other",
    }
    about = {
        "method": "finetune",
        "task": problem.task,
        "label_names": list(problem.names),
        **result,
        "groups": [fingerprint(str(group)) for group in sorted(set(setting.found.groups))],
        "clips": sorted({content_hash(item.clip) for item in setting.found.items}),
        "files": sorted({sha256(f) for item in setting.found.items if item.kind == "frames" for f in item.clip.files}),
        "data_sha256": setting.found.sha(),
        "parents": [parent(backbone)],
        "code": code_version(),
        "sha256": digest,
    }
    if problem.task == "regression":
        about |= {"target_mean": problem.mean.tolist(), "target_std": problem.std.tolist()}
    if problem.task == "segmentation":
        about["decoder"] = "unet"
    arguments = {}
    if cfg.get("fixed_input_size"):
        arguments = {"model_args": {"img_size": setting.pixels.px}}
    return {
        "architecture": plain(backbone),
        "num_classes": problem.outputs,
        "num_features": backbone.model.num_features,
        "label_names": list(problem.names),
        "pretrained_cfg": cfg,
        **arguments,
        "uscl_hub": about,
    }


KEPT = ("fixed_input_size", "first_conv", "classifier", "paper_ids", "paper_name", "origin_url")


def _channels(value) -> list[float]:
    return [float(v) for v in (value if isinstance(value, (tuple, list)) else [value] * 3)]


def parent(backbone: Backbone) -> dict:
    """What the model was made from, and under which licences: the backbone, what it has seen, and its own parents."""
    known = backbone.provenance or {}
    cfg = backbone.model.pretrained_cfg
    sources = [{k: s.get(k) for k in ("name", "licence")} for s in known.get("sources") or ()]
    random = (
        backbone.spec.startswith("random:") or backbone.spec.startswith("timm:") and ":pretrained" not in backbone.spec
    )
    return {
        "name": backbone.name,
        "architecture": backbone.architecture,
        "weights_sha256": backbone.sha,
        "method": "none (random weights)" if random else known.get("method"),
        "licence": "none (random weights)" if random else known.get("licence") or cfg.get("license"),
        "sources": sources,
        "parents": known.get("parents") or [],
        **{key: known[key] for key in LONG if key in known},
    }


def check(folder: Path, model: torch.nn.Module, setting: Setting) -> None:
    """Load the folder as plain timm does and compare logits. Raises UserError if they differ."""
    import timm
    from safetensors.torch import load_file

    x = torch.rand(2, 3, setting.pixels.px, setting.pixels.px, generator=torch.Generator().manual_seed(0))
    if isinstance(model, UNet):
        again = UNet(timm.create_model(plain(setting.backbone), features_only=True), setting.problem.outputs)
        again.load_state_dict(load_file(folder / WEIGHTS_NAME))
    else:
        again = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
    with torch.inference_mode():
        if not torch.allclose(again.eval()(x), model(x), atol=1e-5):
            raise UserError(f"{folder}: loaded again, the model gives other numbers; please report this")


def check_onnx():
    """onnxruntime. Raises UserError if it or another package that ONNX needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError("--onnx needs onnx, onnxscript and onnxruntime: pip install 'uscl-hub[export]'") from error
    return onnxruntime


def write_onnx(folder: Path, model: torch.nn.Module, px: int) -> float:
    """model.onnx with a dynamic batch, input 'image' (batch, 3, px, px), output 'logits'.

    Returns the largest difference from PyTorch. Raises UserError if it is above TOLERANCE of the largest logit, or a
    package is missing.
    """
    onnxruntime = check_onnx()
    x = torch.randn(3, 3, px, px, generator=torch.Generator().manual_seed(0))
    difference = 0.0

    def save(path):
        nonlocal difference
        dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=65536)}}
        program = torch.export.export(model, (x[:2],), dynamic_shapes=dynamic)
        forget_paths(program)
        torch.onnx.export(
            program, (), str(path), dynamo=True, external_data=False, input_names=["image"], output_names=["logits"],
            verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for n in (3, 1):
            want = model(x[:n]).numpy()
            difference = max(difference, float(np.abs(session.run(None, {"image": x[:n].numpy()})[0] - want).max()))
            if difference > TOLERANCE * np.abs(want).max():
                raise UserError(f"{folder / ONNX_NAME}: differs from PyTorch by {difference:g}; it was not kept")

    with torch.no_grad():
        write_whole(folder / ONNX_NAME, save)
    return difference


def card(config: dict) -> str:
    """The export's README.md, from its config.json."""
    p, cfg = config["uscl_hub"], config["pretrained_cfg"]
    rows = "\n".join(
        f"| {markdown(k)} | {v['value']:.3f} | {v['low']:.3f} to {v['high']:.3f} |" for k, v in p["scores"].items()
    )
    chain = "\n".join(made_from(p["parents"]))
    loading = f"""```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()  # {config["num_classes"]} outputs
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""
    if p["task"] == "segmentation":
        loading = "`uscl-hub predict` loads it: a U-Net over timm's feature maps."
    return f"""---
library_name: timm
license: other
license_name: see-licences-below
tags:
- timm
- ultrasound
- medical
---
# {p["task"].capitalize()} of ultrasound images: {", ".join(map(markdown, config["label_names"]))}

A {config["architecture"]} for grey images of {cfg["input_size"][1]} x {cfg["input_size"][2]} pixels, fine-tuned on
{p["items"]} files of {len(p["groups"])} groups by the recipe "{p["recipe"]}". Not a medical device: nothing here has
seen a clinical validation.

{loading}

{markdown(p["imbalance"])}

{_outputs(p)}

| out of fold | value | 95 % interval over groups |
| --- | --- | --- |
{rows}

{p["honesty"]}

Made from (licences: {", ".join(map(markdown, licences(p["parents"]))) or "none stated"}; those of your own images come
on top, and whoever publishes these weights answers for them):

{chain}

Data sha256: `{p["data_sha256"]}`. Weights sha256: `{p["sha256"]}`.
"""


def _outputs(p: dict) -> str:
    """What the outputs mean."""
    if p["task"] == "regression":
        return "A value is output x target_std + target_mean, both in config.json."
    function = "softmax" if p["task"] == "classification" else "sigmoid"
    said = f"Probabilities are {function}(logits / {p['temperature']:.4g}), a temperature fitted out of fold"
    if p["task"] == "segmentation":
        return f"{said}."
    if p["task"] == "multilabel":
        return f"{said} as if every label were present and absent equally often."
    return (
        f"{said} as if all classes were equally frequent. Where they are not, multiply each by its class's frequency "
        "and divide by their sum."
    )
