"""The command `uscl-hub`. Exit codes: 0 done, 1 it failed (the message says why), 2 wrong usage, 141 nobody reads its
output any more, 128 + the number of a signal."""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

from uscl_hub import __version__
from uscl_hub.errors import UserError, printable
from uscl_hub.signals import signals_interrupt


def _list(args):
    from uscl_hub import registry

    rows = [
        {
            "name": name,
            "backbone": registry.plain_name(name),
            "px": e["px"],
            "data": e.get("data"),
            "licence": e["licence"],
            "metrics": e.get("metrics", {}),
            "sha256": e["sha256"],
            "packaged": bool(e.get("file")) and (registry.WEIGHTS / e["file"]).is_file(),
            "hub_id": e.get("hub_id"),
        }
        for name, e in registry.releases().items()
    ]
    lines = []
    for row in rows:
        lines += [row["name"]] + [
            f"  {key:8} {_plain(row[key])}"
            for key in ("backbone", "px", "data", "licence", "metrics", "sha256", "hub_id")
            if row[key]
        ]
    return rows, lines or [
        "No checkpoint has been released yet. Train one with training/run.py, or load any exported folder or Hub id."
    ]


def _info(args):
    """Facts of a release, an exported folder, a lone file or a Hub repository."""
    from uscl_hub import registry, sources

    if args.what in registry.ARCHITECTURES:
        tags = [name for name in registry.releases() if name.partition(".")[0] == args.what]
        return _shown({"name": args.what, "backbone": registry.plain_name(args.what), "released": tags})
    source = sources.find(args.what, revision=args.revision)
    if source.release:
        known = registry.provenance(source.release) or {}
        long = ("manifest", "curves", "frame_hashes")  # in weights/NAME.json, beside this package
        facts = {"name": source.release, **registry.releases()[source.release]}
        return _shown({**facts, "provenance": {k: known[k] for k in known if k not in long}})
    return _shown(_facts_of_file(source.file) if source.file else _facts_of_folder(source.folder))


def _facts_of_file(path) -> dict:
    from uscl_hub import files, tensors

    header = tensors.read_header(path)
    return {
        "path": str(path),
        "sha256": files.sha256(path),
        "tensors": len(header),
        "values": sum(math.prod(e["shape"]) for name, e in header.items() if not name.endswith("num_batches_tracked")),
        "dtypes": sorted({e["dtype"] for e in header.values()}),
    }


def _facts_of_folder(path) -> dict:
    from uscl_hub import checkpoints, files, tensors

    cfg, architecture, _, config = checkpoints.read_config(path)
    weights = path / checkpoints.WEIGHTS_NAME
    header = tensors.read_header(weights)
    return {
        "path": str(path),
        "backbone": architecture,
        "input_size": list(cfg["input_size"]),
        "num_classes": cfg.get("num_classes"),
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "licence": cfg.get("license"),
        "sha256": files.sha256(weights),
        "tensors": len(header),
        "provenance": config.get("uscl_hub"),
    }


def _verify(args):
    from uscl_hub import checkpoints, sources
    from uscl_hub.classifier import check_export
    from uscl_hub.load import load_meta_uscl_backbone

    name, what = sources.split(args.what, args.name)
    source = sources.find(what, name, args.revision) if what else sources.Source(release=name)
    if source.release:
        load_meta_uscl_backbone(source.release)
        return {"ok": True, "name": source.release, "warnings": []}, [f"{source.release}: OK"]
    checked, warnings = "schema, keys, shapes, values", []
    if source.folder:
        about = check_export(source.folder).get("uscl_hub") or {}
        if not about.get("method"):
            warnings.append("config.json has no 'uscl_hub' table with a method: where the weights are from is unknown")
        if about.get("sha256"):
            checked += ", hash"
        else:
            warnings.append("config.json has no SHA-256 of the weights: changed values would not be noticed")
        if not (source.folder / checkpoints.CARD_NAME).is_file():
            warnings.append("there is no README.md (model card)")
    else:
        load_meta_uscl_backbone(name, checkpoint=source.file)
        warnings.append("a lone file has no config.json: its provenance and input size are unknown")
    path = source.folder or source.file
    lines = [f"{path}: warning: {w}" for w in warnings] + [f"{path}: OK ({checked})"]
    return {"ok": True, "path": str(path), "warnings": warnings}, lines


def _convert(args):
    from uscl_hub.convert import convert

    config = convert(args.source, args.out, normalisation=args.normalisation, px=args.px)
    cfg, origin = config["pretrained_cfg"], config["uscl_hub"]
    line = (
        f"{args.out}: {config['architecture']}, {cfg['input_size'][-1]} px, {origin['method']} normalisation "
        f"{cfg['mean'][0]} / {cfg['std'][0]}; dropped {', '.join(origin['dropped']) or 'nothing'}"
    )
    return {"out": str(args.out), **config}, [line]


def _push(args):
    from uscl_hub import hub

    url = hub.push(args.path, args.repo, private=args.private, revision=args.revision)
    return {"repo": args.repo, "url": url}, [f"Uploaded {args.path} to {args.repo}: {url}"]


def _passed_over(report: dict) -> list[str]:
    return [f"skipped {f['path']}: {f['reason']}" for f in report["failed"]] + report["found"]


def _embed(args):
    from uscl_hub import ranks
    from uscl_hub.features.embed import embed

    report = embed(
        args.inputs,
        args.output,
        name=args.name,
        checkpoint=args.checkpoint,
        revision=args.revision,
        stride=args.stride,
        crop=args.crop,
        frames=args.frames,
        batch_size=args.batch_size,
        device=args.device,
        progress=not args.json,
    )
    if ranks.rank():
        return None, []  # the first process says it
    lines = [f"{args.output}: {report['clips']} clips, {report['frames']} frames"]
    lines += _passed_over(report)
    lines += [f"note on {n['clip']}: {n['note']}" for n in report["notes"]]
    lines += [
        f"warning: {clip} may still show burned-in text after cropping: look at it before sharing anything of it"
        for clip in report["burned_in_text_suspected"]
    ]
    return report, lines


def _browse(args):
    from uscl_hub.browse import browse

    browse(args.table, add=args.add, colour=args.colour, port=args.port, open_browser=not args.no_browser)
    return None, []


def _predict(args):
    from uscl_hub.predict import predict

    report = predict(
        args.model,
        args.inputs,
        args.output,
        per=args.per,
        frames=args.frames,
        onnx=args.onnx,
        device=args.device,
        progress=not args.json,
    )
    lines = [f"{args.output}: {report['rows']} rows of {report['clips']} clips"]
    lines += _passed_over(report)
    return report, lines + [f"note on {n['path']}: {n['note']}" for n in report["notes"]]


def _search(args):
    from uscl_hub.features.search import search

    rows = search(args.query, args.features, k=args.k, sheet=args.sheet, device=args.device)
    lines = [f"{row['similarity']:.4f}  {row['clip']}" for row in rows]
    return rows, lines + ([f"contact sheet: {args.sheet}"] if args.sheet else [])


def _export(args):
    from uscl_hub.deploy import export

    result = export(
        args.what, args.output, format=args.format, name=args.name, revision=args.revision, frames=args.frames
    )
    return result, [
        f"{args.output}: {args.format}, largest difference from eager {result['max_difference']:.2e} "
        f"on {result['frames']} {result['source']} frames"
    ]


def _shown(facts: dict):
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and key == "provenance":
            lines += [key] + [f"  {name:18} {_plain(entry)}" for name, entry in value.items()]
        elif value is not None:
            lines.append(f"{key:12} {_plain(value)}")
    return facts, lines


def _plain(value) -> str:
    if isinstance(value, list) and len(value) > 8:  # the hashes of what it was trained on: --json has them
        return f"{len(value)} entries"
    return value if isinstance(value, str) else json.dumps(value)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _what(sub, help="released name, exported folder, .safetensors file, or Hub id org/name"):
    sub.add_argument("what", metavar="NAME|PATH|ORG/NAME", help=help)
    sub.add_argument("--revision", help="branch, tag or commit on the Hub")


def _model(sub):
    sub.add_argument("--name", default="meta_uscl_resnet18", help="model name (default: %(default)s)")


def _list_arguments(sub):
    """It has none."""


def _verify_arguments(sub):
    _what(sub)
    _model(sub)


def _convert_arguments(sub):
    sub.add_argument("source", type=Path, metavar="OFFICIAL.pth")
    sub.add_argument("out", type=Path, help="new folder")
    sub.add_argument(
        "--normalisation",
        choices=["meta_uscl", "uscl"],
        help="what it was trained with: 0.18/0.24 or the older 0.5/0.25 (default: by the file's heads)",
    )
    sub.add_argument("--px", type=_positive, default=224, help="input size to recommend (default: %(default)s)")


def _push_arguments(sub):
    sub.add_argument("path", type=Path, help="exported folder")
    sub.add_argument("repo", metavar="org/name")
    sub.add_argument("--private", action="store_true", help="make a new repository private")
    sub.add_argument("--revision", help="branch to upload to (default: main)")


def _inputs(sub):
    sub.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files and folders, any mix")
    sub.add_argument(
        "--frames",
        choices=["auto", "clip", "images"],
        default="auto",
        help="numbered images of a folder are one clip, separate images, or what their likeness says "
        "(default: %(default)s)",
    )
    sub.add_argument("--device", default="cpu")


def _browse_arguments(sub):
    sub.add_argument("table", type=Path, help="features.parquet of `uscl-hub embed`, or a table of `uscl-hub predict`")
    sub.add_argument("--add", type=Path, help="labels or predictions to show: a table with the column clip or path")
    sub.add_argument("--colour", help="column that colours the map (default: label, if there is one, else folder)")
    sub.add_argument("--port", type=int, default=0, help="(default: a free one)")
    sub.add_argument("--no-browser", action="store_true", help="only print the address")


def _embed_arguments(sub):
    _inputs(sub)
    sub.add_argument("-o", "--output", type=Path, required=True, help="features.parquet")
    _model(sub)
    sub.add_argument("--checkpoint", help="released tag, file, folder or Hub id (default: the default release)")
    sub.add_argument("--revision", help="branch, tag or commit on the Hub")
    sub.add_argument("--stride", type=_positive, default=1, help="take every n-th frame (default: %(default)s)")
    sub.add_argument(
        "--crop",
        choices=["crop", "blank", "none"],
        default="crop",
        help="remove the scanner's user interface as in training (default: %(default)s)",
    )
    sub.add_argument("--batch-size", type=_positive, default=64)


def _predict_arguments(sub):
    sub.add_argument("model", type=Path, metavar="MODEL", help="folder `export` of training/finetune.py")
    _inputs(sub)
    sub.add_argument("-o", "--output", type=Path, required=True, help="predictions.csv or predictions.parquet")
    sub.add_argument(
        "--per", choices=["clip", "frame"], default="clip", help="a row a clip, or a frame (default: %(default)s)"
    )
    sub.add_argument("--onnx", action="store_true", help="run its model.onnx by onnxruntime")


def _search_arguments(sub):
    sub.add_argument("query", help="image, video, DICOM file or folder of frames; or a clip id of the table")
    sub.add_argument("features", type=Path, help="features.parquet of `uscl-hub embed`")
    sub.add_argument("-k", type=_positive, default=5, help="clips to show (default: %(default)s)")
    sub.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG")
    sub.add_argument("--device", default="cpu")


def _export_arguments(sub):
    _what(sub)
    _model(sub)
    sub.add_argument("-o", "--output", type=Path, required=True)
    sub.add_argument("--format", choices=["onnx", "torch-export"], required=True)
    sub.add_argument("--frames", type=Path, help="image, video, DICOM file or folder to check on (default: simulated)")


# name: what it does, what adds its arguments, its help. What it does returns what --json prints and the lines of text.
COMMANDS = {
    "list": (_list, _list_arguments, "List the released checkpoints."),
    "info": (_info, _what, "Show what a checkpoint is."),
    "verify": (_verify, _verify_arguments, "Check a checkpoint's schema, hash, keys, shapes, values and provenance."),
    "convert": (_convert, _convert_arguments, "Convert the authors' .pth checkpoint into a folder that timm loads."),
    "push": (_push, _push_arguments, "Upload an exported folder to the Hugging Face Hub."),
    "embed": (_embed, _embed_arguments, "Compute features of images, videos and DICOM files."),
    "predict": (_predict, _predict_arguments, "Run a model of training/finetune.py on images, videos and DICOM files."),
    "search": (_search, _search_arguments, "Find the clips most similar to one."),
    "browse": (
        _browse,
        _browse_arguments,
        "Look at a table: a map with pictures, in the browser of this machine.",
    ),
    "export": (
        _export,
        _export_arguments,
        "Write a backbone without its classifier for deployment, checked against PyTorch; with it: finetune.py --onnx.",
    ),
}


def parser() -> argparse.ArgumentParser:
    """The arguments of `uscl-hub` and of all its COMMANDS."""
    top = argparse.ArgumentParser("uscl-hub", description="Ultrasound backbones: inspect, use, convert and share them.")
    top.add_argument("--version", action="version", version=f"uscl-hub {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, add_arguments, help) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
        add_arguments(sub)
    return top


def main(argv=None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv) -> int:
    """The one place where errors become a line and a status."""
    args = parser().parse_args(argv)
    try:
        with signals_interrupt():
            result, lines = args.function(args)
    except KeyboardInterrupt as stop:
        print("uscl-hub: interrupted; what was finished is kept: start it again to go on", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (UserError, OSError, ValueError, ImportError) as error:  # anything else is a fault of ours: a traceback
        if args.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"uscl-hub: {printable(str(error))}", file=sys.stderr)
        return 1
    if result is None:
        return 0
    print(json.dumps(result) if args.json else "\n".join(map(printable, lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
