"""Write a trained backbone as a folder in timm's Hub format, with its provenance and a model card."""

import datetime
import subprocess
from pathlib import Path

import uscl_hub
from training.data.groups import fingerprint  # noqa: F401  (its name here since version 0.1)
from training.messages import markdown
from uscl_hub.checkpoints import replace_folder
from uscl_hub.registry import make_cfg, plain_name

LICENCE_OF_CODE = "apache-2.0"


def code_version():
    """Package version, and the commit where the code is a git checkout."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"version": uscl_hub.__version__, "commit": git.stdout.strip() if git.returncode == 0 else None}


def export(backbone, name, size, folder, provenance):
    """Export a backbone; an existing export in `folder` is replaced file by file, each atomically.

    Args:
        backbone: the timm model, without classifier.
        name: the name it was created by.
        size: pixels of the input's sides.
        folder: is made.
        provenance: a `Provenance`, what config.json's "uscl_hub" says; or, from scripts for version 0.1, its dict.

    Returns:
        The folder as a Path: model.safetensors, config.json, README.md.

    Raises CheckpointError if a weight is not finite: nothing is written.
    """
    facts = provenance if isinstance(provenance, dict) else provenance.as_dict()

    def config(digest):
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return {
            "architecture": plain_name(name),
            "num_classes": 0,
            "num_features": backbone.num_features,
            "pretrained_cfg": make_cfg(size, architecture=plain_name(name), tag="meta_uscl"),
            "uscl_hub": {**facts, "code": code_version(), "sha256": digest, "created": created},
        }

    replace_folder(folder, backbone.state_dict(), config, model_card)
    return Path(folder)


METHODS = {"distil": "distillation", "simclr": "SimCLR", "uscl": "USCL", "meta_uscl": "Meta-USCL"}


def model_card(config):
    """The export's README.md, from its config.json."""
    p, cfg = config["uscl_hub"], config["pretrained_cfg"]
    of_data = sorted({markdown(s["licence"]) for s in p["sources"]})
    metrics = "\n".join(f"| {markdown(k)} | {v:.4g} |" for k, v in p["metrics"].items() if v is not None)
    sources = "\n".join(
        f"| {markdown(s['name'])} | {s['clips']} | {s['frames']} | {markdown(s['licence'])} |" for s in p["sources"]
    )
    parents = p.get("parents") or []
    made = "\n".join(made_from(parents))
    terms = ", ".join(map(markdown, licences(parents))) or "none stated"
    made = f"\nMade from (licences: {terms}):\n\n{made}\n" if made else ""
    way = "" if p["method"] == "distil" else " by the method of arXiv 2212.04097"
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
license: other
license_name: see-data-licences
tags:
- timm
- ultrasound
- medical
- meta-uscl
---
# {config["architecture"]}, pretrained on ultrasound by {markdown(METHODS.get(p["method"], p["method"]))}

{config["num_features"]} features from a {cfg["input_size"][1]} x {cfg["input_size"][2]} grey image, pretrained for
{p["steps"]} steps with uscl-hub {p["code"]["version"]} (commit {p["code"]["commit"]}){way}. Not a
medical device: features for research, without any clinical validation.

```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

Training data (licences: {", ".join(of_data)}; whoever publishes these weights answers for them):

| source | clips | frames | licence |
| --- | --- | --- | --- |
{sources}
{made}
Manifest sha256: `{p["manifest_sha256"]}`. Weights sha256: `{p["sha256"]}`.

| metric at the last step | value |
| --- | --- |
{metrics}
"""


def licences(parents: list[dict]) -> list[str]:
    """Every licence of the chain, each once."""
    found = {}
    for p in parents:
        for licence in (p.get("licence"), *(s.get("licence") for s in p.get("sources") or ())):
            if licence and not str(licence).startswith("none"):
                found[str(licence)] = None
        found |= dict.fromkeys(licences(p.get("parents") or []))
    return list(found)


def made_from(parents: list[dict], depth: int = 0) -> list[str]:
    """A line of Markdown for each network or data set that a model was made from, and for what that was made from."""
    lines = []
    for p in parents:
        data = "; ".join(f"{markdown(s['name'])} ({markdown(s['licence'])})" for s in p.get("sources") or ())
        licence = markdown(p.get("licence") or "licence not stated")
        lines.append(f"{'  ' * depth}- {markdown(p['name'])}: {licence}" + (f"; data: {data}" if data else ""))
        lines += made_from(p.get("parents") or [], depth + 1)
    return lines
