"""The command `uscl-hub`. Exit codes: 0 done, 1 it failed (the message says why), 2 wrong usage."""

import argparse
import json
import sys
from pathlib import Path

from uscl_hub import __version__


def _list(args):
    from uscl_hub import models

    rows = [
        {
            "name": name,
            "backbone": models.ARCHITECTURES[name.split(".")[0]],
            "px": e["px"],
            "data": e.get("data"),
            "licence": e["licence"],
            "metrics": e.get("metrics", {}),
            "sha256": e["sha256"],
            "packaged": bool(e.get("file")),
            "hub_id": e.get("hub_id"),
        }
        for name, e in models.releases().items()
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
    from uscl_hub import checkpoints, models

    released = models.releases()
    if args.what in released:
        known = models.provenance(args.what) or {}
        long = ("manifest", "curves")  # in weights/NAME.json, beside this package
        return _shown(
            {"name": args.what, **released[args.what], "provenance": {k: known[k] for k in known if k not in long}}
        )
    if args.what in models.ARCHITECTURES:
        tags = [name for name in released if name.split(".")[0] == args.what]
        return _shown({"name": args.what, "backbone": models.ARCHITECTURES[args.what], "released": tags})
    path = _local_or_hub(args)
    if path.is_file():
        header = checkpoints.read_header(path)
        count = sum(_count(e["shape"]) for name, e in header.items() if not name.endswith("num_batches_tracked"))
        return _shown(
            {
                "path": str(path),
                "sha256": checkpoints.sha256(path),
                "tensors": len(header),
                "values": count,
                "dtypes": sorted({e["dtype"] for e in header.values()}),
            }
        )
    cfg, architecture, _, config = checkpoints.read_config(path)
    weights = path / checkpoints.WEIGHTS_NAME
    header = checkpoints.read_header(weights)
    return _shown(
        {
            "path": str(path),
            "backbone": architecture,
            "input_size": list(cfg["input_size"]),
            "num_classes": cfg.get("num_classes"),
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
            "licence": cfg.get("license"),
            "sha256": checkpoints.sha256(weights),
            "tensors": len(header),
            "provenance": config.get("uscl_hub"),
        }
    )


def _verify(args):
    from uscl_hub import checkpoints, models

    released = models.releases()
    if args.what in released:
        import timm

        timm.create_model(args.what, pretrained=True)
        return {"ok": True, "name": args.what, "warnings": []}, [f"{args.what}: OK"]
    path, warnings, checked = _local_or_hub(args), [], "schema, keys, shapes, values"
    if path.is_file():
        from uscl_hub.load import load_meta_uscl_backbone

        load_meta_uscl_backbone(args.name, checkpoint=path)
        warnings.append("a lone file has no config.json: its provenance and input size are unknown")
    else:
        provenance = checkpoints.check_folder(path).get("uscl_hub")
        provenance = provenance if isinstance(provenance, dict) else {}
        if not provenance.get("method"):
            warnings.append("config.json has no 'uscl_hub' table with a method: where the weights are from is unknown")
        if provenance.get("sha256"):
            checked += ", hash"
        else:
            warnings.append("config.json has no SHA-256 of the weights: changed values would not be noticed")
        if not (path / checkpoints.CARD_NAME).is_file():
            warnings.append("there is no README.md (model card)")
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


def _embed(args):
    from uscl_hub.features.embed import embed

    report = embed(
        args.inputs,
        args.output,
        name=args.name,
        checkpoint=args.checkpoint,
        revision=args.revision,
        stride=args.stride,
        crop=args.crop,
        batch_size=args.batch_size,
        device=args.device,
        progress=not args.json,
    )
    lines = [f"{args.output}: {report['clips']} clips, {report['frames']} frames"]
    lines += [f"skipped {f['path']}: {f['reason']}" for f in report["failed"]]
    lines += [f"note on {n['clip']}: {n['note']}" for n in report["notes"]]
    lines += [
        f"warning: {clip} may still show burned-in text after cropping: look at it before sharing anything of it"
        for clip in report["burned_in_text_suspected"]
    ]
    return report, lines


def _search(args):
    from uscl_hub.features.embed import search

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


def _local_or_hub(args) -> Path:
    from uscl_hub import hub
    from uscl_hub.checkpoints import CheckpointError

    path = Path(args.what).expanduser()
    if path.exists():
        return path
    if hub.is_repo_id(args.what):
        return hub.fetch_folder(args.what, args.revision)
    raise CheckpointError(
        f"{args.what}: neither a released name, nor an existing file or folder, nor a Hub id org/name"
    )


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


def _count(shape) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("uscl-hub", description="Ultrasound backbones: inspect, use, convert and share them.")
    top.add_argument("--version", action="version", version=f"uscl-hub {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(function=function)
        sub.add_argument("--json", action="store_true", help="print JSON for programs")
        return sub

    def what(sub, help="released name, exported folder, .safetensors file, or Hub id org/name"):
        sub.add_argument("what", metavar="NAME|PATH|ORG/NAME", help=help)
        sub.add_argument("--revision", help="branch, tag or commit on the Hub")

    def model(sub):
        sub.add_argument("--name", default="meta_uscl_resnet18", help="model name (default: %(default)s)")

    command("list", _list, "List the released checkpoints.")
    what(command("info", _info, "Show what a checkpoint is."))
    sub = command("verify", _verify, "Check a checkpoint's schema, hash, keys, shapes, values and provenance.")
    what(sub)
    model(sub)
    sub = command("convert", _convert, "Convert the authors' .pth checkpoint into a folder that timm loads.")
    sub.add_argument("source", type=Path, metavar="OFFICIAL.pth")
    sub.add_argument("out", type=Path, help="new folder")
    sub.add_argument(
        "--normalisation",
        choices=["meta_uscl", "uscl"],
        help="what it was trained with: 0.18/0.24 or the older 0.5/0.25 (default: by the file's heads)",
    )
    sub.add_argument("--px", type=_positive, default=224, help="input size to recommend (default: %(default)s)")
    sub = command("push", _push, "Upload an exported folder to the Hugging Face Hub.")
    sub.add_argument("path", type=Path, help="exported folder")
    sub.add_argument("repo", metavar="org/name")
    sub.add_argument("--private", action="store_true", help="make a new repository private")
    sub.add_argument("--revision", help="branch to upload to (default: main)")
    sub = command("embed", _embed, "Compute features of images, videos and DICOM files.")
    sub.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files and folders, any mix")
    sub.add_argument("-o", "--output", type=Path, required=True, help="features.parquet")
    model(sub)
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
    sub.add_argument("--device", default="cpu")
    sub = command("search", _search, "Find the clips most similar to one.")
    sub.add_argument("query", help="image, video, DICOM file or folder of frames; or a clip id of the table")
    sub.add_argument("features", type=Path, help="features.parquet of `uscl-hub embed`")
    sub.add_argument("-k", type=_positive, default=5, help="clips to show (default: %(default)s)")
    sub.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG")
    sub.add_argument("--device", default="cpu")
    sub = command("export", _export, "Write the model for deployment, and check it against PyTorch.")
    what(sub)
    model(sub)
    sub.add_argument("-o", "--output", type=Path, required=True)
    sub.add_argument("--format", choices=["onnx", "torch-export"], required=True)
    sub.add_argument("--frames", type=Path, help="image, video, DICOM file or folder to check on (default: simulated)")
    return top


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    try:
        result, lines = args.function(args)
    except KeyboardInterrupt:
        print("uscl-hub: interrupted; what was finished is kept", file=sys.stderr)
        return 1
    except Exception as error:
        from uscl_hub.checkpoints import CheckpointError

        if not isinstance(error, (CheckpointError, OSError, ValueError, ImportError)):
            raise  # a fault of ours: the traceback is the message
        print(
            json.dumps({"error": str(error)}) if args.json else f"uscl-hub: {error}",
            file=sys.stdout if args.json else sys.stderr,
        )
        return 1
    print(json.dumps(result) if args.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
