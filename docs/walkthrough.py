# %% [markdown]
# # From your own videos to your own backbone to your own classifier
#
# A script in cells (VS Code, Spyder, Jupyter with jupytext), or all at once: `python docs/walkthrough.py`, in a
# checkout with `pip install -e '.[train,embed,export]'`. As it stands it simulates clips. With your own, change the
# first cell; a backbone worth using wants hundreds of clips and thousands of steps.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]) if "__file__" in globals() else ".")  # the checkout

CLIPS = Path("walkthrough/clips")  # videos, DICOM, folders of frames, images: any nesting
GROUP = r"/(subj\d+)_"  # what in a clip's path is its patient: clips/lung/subj03_clip01.mp4
LABEL = r"/(\w+)/"  # and what is its class
OUT = Path("walkthrough/run")
MODEL, PX, STEPS = "meta_uscl_resnet18", 64, 40

if not CLIPS.exists():
    from training.data.simulate import write_demo

    write_demo(CLIPS, clips=100, frames=12, size=96, seed=0)

# %% [markdown]
# ## 1. Look at what will be learned from
# Every clip is decoded once into a cache, without the scanner's user interface. Look at the pictures before and after
# (`sheets/*.png` beside the report), at what could not be read, and at clips that may still show a patient's name.

# %%
import json

from training.data.ingest import ingest

# workers=0: in this process, so that this runs anywhere; training/run.py decodes on all cores
cache = ingest([CLIPS], OUT / "cache", size=round(1.25 * PX), max_frames=400, workers=0, sheets=True)
report = json.loads((cache.path / "report.json").read_text())
print(cache, "unreadable:", report["unreadable"], "text in:", report["burned_in_text_suspected"], sep="\n")

# %% [markdown]
# ## 2. Train a backbone without labels
# The same as `python training/run.py --data.roots ... --out ...`. It can be stopped (Ctrl-C) and, with `resume=True`,
# goes on where it was. `tensorboard --logdir walkthrough/run` shows it at work.

# %%
from training import run
from training.config import Config, Data, Model, Optim

config = Config(
    out=str(OUT),
    resume=True,
    data=Data(roots=(str(CLIPS),), group=GROUP, label=LABEL, meta_fraction=0.2, val_fraction=0.2),
    model=Model(name=MODEL, size=PX),
    optim=Optim(batch=16, steps=STEPS, lr=0.03),
)
run.main(config)

# %% [markdown]
# ## 3. See what it has learned
# Features of all clips in one table, and the clips most like one of them as a picture.

# %%
from uscl_hub.features.embed import embed
from uscl_hub.features.search import search

EXPORT, TABLE = OUT / "export", OUT / "features.parquet"
embed([CLIPS], TABLE, name=MODEL, checkpoint=EXPORT)
for row in search(cache.ids[0], TABLE, sheet=OUT / "nearest.png"):
    print(f"{row['similarity']:.3f} {row['clip']}")

# %% [markdown]
# ## 4. A classifier on frozen features
# Split by patient, never by clip: frames of one patient in training and test would be recognised, not diagnosed. Here
# the backbone has seen the test patients' clips, without labels; for a result to publish, leave them out of step 2 too
# (`training/evaluate.py` refuses anything else).

# %%
import re

import numpy as np
import pyarrow.parquet as pq
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

rows = pq.read_table(TABLE, filters=[("level", "=", "clip")]).to_pylist()
x = np.array([row["feature"] for row in rows])
y = np.array([re.search(LABEL, row["clip"])[1] for row in rows])
patients = [re.search(GROUP, row["clip"])[1] for row in rows]
train, test = next(GroupShuffleSplit(1, test_size=0.3, random_state=0).split(x, y, patients))
linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x[train], y[train])
print(f"linear, balanced accuracy of clips: {balanced_accuracy_score(y[test], linear.predict(x[test])):.2f}")

# %% [markdown]
# ## 5. Fine-tune the whole network
# On single frames, which the cache holds already decoded and cropped.

# %%
import timm
import torch

from uscl_hub.preprocess import normalise, resize

classes = sorted(set(y))
position = {name: i for i, name in enumerate(cache.ids)}


def frames(which):
    """float32 (N, 3, PX, PX) and int64 (N,): the frames of some rows' clips, preprocessed as everywhere, and class."""
    images, labels = [], []
    for i in which:
        clip = cache.clip(position[rows[i]["clip"]])
        images += [resize(frame, PX) for frame in clip]
        labels += [classes.index(y[i])] * len(clip)
    return normalise(np.stack(images)), torch.tensor(labels)


torch.manual_seed(0)
images, labels = frames(train)
model = timm.create_model(f"local-dir:{EXPORT}", pretrained=True, num_classes=len(classes)).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
for step in range(STEPS):
    batch = torch.randint(len(images), (32,))
    loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
images, labels = frames(test)
with torch.inference_mode():
    found = model.eval()(images).argmax(1)
print(f"fine-tuned, balanced accuracy of frames: {balanced_accuracy_score(labels, found):.2f}")

# %% [markdown]
# ## 6. Take it elsewhere
# The backbone as ONNX, checked against PyTorch on real frames; the export's folder loads with plain timm anywhere, and
# `uscl-hub push walkthrough/run/export org/name` shares it.

# %%
from uscl_hub.deploy import export

print(export(str(EXPORT), OUT / "backbone.onnx", format="onnx", name=MODEL, frames=next(CLIPS.rglob("*.mp4"))))
