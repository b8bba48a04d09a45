"""A backbone as ONNX or torch.export file, checked against eager PyTorch before it gets its name."""

import io
from pathlib import Path

import numpy as np
import torch

from uscl_hub import sources
from uscl_hub.errors import CheckpointError
from uscl_hub.files import write_whole
from uscl_hub.load import load_meta_uscl_backbone
from uscl_hub.preprocess import create_transform

TOLERANCE = 1e-4  # of the largest feature, relative


def export(what: str, output, *, format: str, name: str = "meta_uscl_resnet18", revision=None, frames=None) -> dict:
    """Write the backbone `what` (as for load_meta_uscl_backbone; or a model name) to a file with a dynamic
    batch.

    format: 'onnx' or 'torch-export'. frames: an image, video, DICOM file or folder to check on, by default
    synthetic speckle. Returns the largest difference from eager. Raises CheckpointError, leaving no file, if it
    is too large.

    >>> import tempfile
    >>> result = export("meta_uscl_resnet18", Path(tempfile.mkdtemp()) / "backbone.pt2", format="torch-export")
    >>> result["max_difference"] < 1e-4, result["source"]
    (True, 'synthetic')
    """
    output = Path(output)
    name, checkpoint = sources.split(what, name)
    model = load_meta_uscl_backbone(name, checkpoint=checkpoint, revision=revision)
    batch, source = _batch(create_transform(model), frames)
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=65536)}}
    difference = 0.0

    def write(path):
        nonlocal difference
        program = torch.export.export(model, (batch[:2],), dynamic_shapes=dynamic)  # of 1 it would be a constant
        forget_paths(program)
        run, scale = {"onnx": _onnx, "torch-export": _torch_export}[format](program, path), 1e-12
        for n in (len(batch), 1):
            want = model(batch[:n])
            difference = max(difference, float((torch.as_tensor(run(batch[:n])) - want).abs().max()))
            scale = max(scale, float(want.abs().max()))
        if not difference <= TOLERANCE * scale:
            raise CheckpointError(
                f"{output}: the {format} file differs from PyTorch by {difference:g}; it was not kept"
            )

    with torch.no_grad():
        write_whole(output, write)
    return {
        "output": str(output),
        "format": format,
        "max_difference": difference,
        "frames": len(batch),
        "source": source,
        "input": ["batch", *batch.shape[1:]],
    }


def forget_paths(program) -> None:
    """Drop from a torch.export.ExportedProgram, in place, what both formats would say of every operation: where its
    code is, with the folders of this machine.

    >>> program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
    >>> forget_paths(program)
    >>> [node.name for node in program.graph.nodes if "stack_trace" in node.meta]
    []
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _torch_export(program, path: Path):
    content = io.BytesIO()  # torch's writer ends the whole program where a disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getvalue())
    content.seek(0)
    return torch.export.load(content).module()


def _onnx(program, path: Path):
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ImportError("ONNX needs onnx, onnxscript and onnxruntime: pip install 'uscl-hub[export]'") from error
    torch.onnx.export(
        program,
        (),
        str(path),
        dynamo=True,
        external_data=False,
        input_names=["image"],
        output_names=["features"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def _batch(transform, frames) -> tuple[torch.Tensor, str]:
    """At least 2 preprocessed frames, and what they are."""
    if frames is None:
        noise = np.random.default_rng(0).rayleigh(40, (4, 96, 128)).clip(0, 255).astype(np.uint8)
        return torch.stack([transform(frame) for frame in noise]), "synthetic"
    from uscl_hub.clips import UnreadableClip, find_clips
    from uscl_hub.clips.decode import decode

    taken = []
    for clip in find_clips([frames])[:8]:
        try:
            taken += [transform(frame) for frame in decode(clip, max_frames=4)[0]]
        except UnreadableClip as error:
            raise ValueError(str(error)) from error
    if not taken:
        raise ValueError(f"{frames}: no image, video or DICOM file")
    return torch.stack(taken if len(taken) > 1 else taken * 2), "real"
