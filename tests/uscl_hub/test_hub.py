"""The Hub with the real huggingface_hub client, against a local HTTP server that speaks the endpoints
it uses."""

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import timm
import torch
from helpers import ROOT

from uscl_hub import checkpoints, models, sources
from uscl_hub.errors import CheckpointError
from uscl_hub.hub import push

CARD = "---\nlibrary_name: timm\n---\n# card\n"


class Hub(ThreadingHTTPServer):
    """Repositories: name -> {'refs': {branch: commit}, 'commits': {commit: {file: bytes}}}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.log, self.lfs, self.fault = {}, [], {}, {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repo, files, branch="main"):
        entry = self.repos.setdefault(repo, {"refs": {}, "commits": {}})
        commit = hashlib.sha1(f"{repo}{len(entry['commits'])}".encode()).hexdigest()
        entry["commits"][commit], entry["refs"][branch] = files, commit
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.server.log.append(f"{self.command} {self.path}")
        if self.path == "/mend":  # for the tests: from now on all is well
            self.server.fault.clear()
            return self.reply(200)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if not match:
            return self.reply(404)
        repo, revision, name = match.groups()
        if repo == "org/gated":
            return self.reply(401, X_Error_Code="GatedRepo", X_Error_Message="Access to model org/gated is restricted.")
        if repo == "org/private" and not self.headers.get("Authorization") == "Bearer hf_secret":
            return self.reply(401, X_Error_Code="RepoNotFound")
        entry = self.server.repos.get(repo)
        if entry is None:
            return self.reply(404, X_Error_Code="RepoNotFound")
        commit = entry["refs"].get(revision, revision)
        if commit not in entry["commits"]:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        data = entry["commits"][commit].get(name)
        if data is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {
            "X_Repo_Commit": commit,
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Accept_Ranges": "bytes",
        }
        if name.endswith(".safetensors"):
            headers.update(X_Linked_Etag=f'"{hashlib.sha256(data).hexdigest()}"', X_Linked_Size=str(len(data)))
        if self.command == "HEAD":
            return self.reply(200, Content_Length=str(len(data)), **headers)
        fault = self.server.fault.get(repo) if name.endswith(".safetensors") else None
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if fault in ("once", "always"):
            if fault == "once":
                del self.server.fault[repo]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[start : len(data) // 2])
            self.close_connection = True
            return
        self.reply(206 if start else 200, data[start:], **headers)

    do_GET = do_HEAD

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.log.append(f"{self.command} {self.path}")
        if self.path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/lfs/")
            server.lfs[self.path.removeprefix("/lfs/")] = body
            return self.reply(200)
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.reply(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            server.repos.setdefault(f"{asked['organization']}/{asked['name']}", {"refs": {}, "commits": {}})
            return self.reply(200, {"url": f"{server.url}/{asked['organization']}/{asked['name']}"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.reply(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "shouldIgnore": False,
                            "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                        }
                        for f in files
                    ]
                },
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.reply(
                200,
                {
                    "transfer": "basic",
                    "objects": [
                        {**o, "actions": {"upload": {"href": f"{server.url}/lfs/{o['oid']}"}}} for o in objects
                    ],
                },
            )
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/?]+).*", self.path)
        if not match:
            return self.reply(404)
        files = {}
        for line in body.splitlines():
            line = json.loads(line)
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = server.lfs[line["value"]["oid"]]
        commit = server.add(match[1], files, match[2])
        self.reply(
            200,
            {"success": True, "commitOid": commit, "commitUrl": f"{server.url}/{match[1]}/commit/{commit}"},
        )

    do_PUT = do_POST


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("hub") / "out", 1)


def make_export(folder, seed, **extra):
    torch.manual_seed(seed)
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    checkpoints.save_folder(
        folder,
        state,
        {
            "architecture": "resnet18",
            "num_classes": 0,
            "num_features": 512,
            "pretrained_cfg": models.make_cfg(72),
            "uscl_hub": {"method": "test", "seed": seed},
        },
        CARD,
    )
    return folder


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def client(hub, tmp_path, code, *arguments, **env):
    """Run code in a fresh interpreter whose Hub is the local server and whose caches are below tmp_path."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    ours = {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return fresh.run(PREAMBLE + code, *arguments, cwd=tmp_path, env={**keep, **ours, **env})


PREAMBLE = """
import sys, time, torch, uscl_hub
from uscl_hub import load_meta_uscl_backbone as load
time.sleep = lambda seconds: None  # the client's pauses between its retries
"""
ERRORS = """
def error(*words, named=True, **arguments):
    try:
        load(**arguments)
    except uscl_hub.checkpoints.CheckpointError as e:
        for word in (arguments["checkpoint"], *words)[not named:]:
            assert word in str(e), (word, str(e))
    else:
        raise SystemExit(f"no error for {arguments}")
"""


@pytest.mark.slow
def test_download_cache_revision_and_offline(hub, export, tmp_path):
    first = hub.add("org/good", files(export))
    newer = make_export(tmp_path / "newer", 2)
    second = hub.add("org/good", files(newer))
    hub.repos["org/good"]["refs"]["v1"] = first
    code = (
        ERRORS
        + """
first, second, old, new = sys.argv[1:]
values = lambda m: m.state_dict().values()
same = lambda a, b: all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))
m = load(checkpoint="org/good")
assert same(m, load(checkpoint=new)) and not m.training
assert uscl_hub.create_transform(m)(torch.zeros(9, 9)).shape == (3, 72, 72)
for r in ("v1", first): assert same(load(checkpoint="org/good", revision=r), load(checkpoint=old))
assert same(load(checkpoint="org/good", revision=second), m)
import timm
assert same(timm.create_model(f"hf-hub:org/good@{first}", pretrained=True), load(checkpoint=old))
"""
    )
    result = client(hub, tmp_path, code, first, second, export, newer)
    assert result.returncode == 0, result.stderr
    assert sum(line.startswith("GET") and line.endswith("safetensors") for line in hub.log) == 2  # one a commit

    hub.log.clear()
    result = client(hub, tmp_path, 'load(checkpoint="org/good")\nload(checkpoint="org/good", revision=%r)' % first)
    assert result.returncode == 0, result.stderr
    assert not any(line.startswith("GET") for line in hub.log)  # all from the cache

    hub.log.clear()
    code = (
        ERRORS
        + """
load(checkpoint="org/good"); load(checkpoint="org/good", revision="v1")
error("HF_HUB_OFFLINE", checkpoint="org/never")
error("HF_HUB_OFFLINE", checkpoint="org/good", revision="v9")
error("HF_HUB_OFFLINE", checkpoint="org/good", cache_dir=sys.argv[1])
"""
    )
    result = client(hub, tmp_path, code, tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert hub.log == []


def test_every_refusal_is_named_and_says_what_to_do(hub, export, tmp_path):
    hub.add("org/good", files(export))
    hub.add("org/pickle", {"config.json": files(export)["config.json"], "pytorch_model.bin": b"\x80\x02"})
    hub.add("org/notours", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"12345678"})
    hub.add("org/private", files(export))
    hub.add("org/flip", files(export))
    hub.fault["org/flip"] = "flip"
    code = (
        ERRORS
        + """
error("no such repository", checkpoint="org/missing")
error("no such revision", checkpoint="org/good", revision="v9")
error("hf auth login", checkpoint="org/private")
error("is gated", "hf auth login", checkpoint="org/gated")
error("model.safetensors", "no such file", checkpoint="org/pickle")
error("config.json", "architecture", named=False, checkpoint="org/notours")
error("SHA-256", "delete", named=False, checkpoint="org/flip")
"""
    )
    result = client(hub, tmp_path, code)
    assert result.returncode == 0, result.stderr
    result = client(hub, tmp_path, 'load(checkpoint="org/private")', HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr
    result = client(
        hub,
        tmp_path,
        ERRORS + 'error("could not be reached", checkpoint="org/other")',
        HF_ENDPOINT="http://127.0.0.1:9",
    )  # nobody listens
    assert result.returncode == 0, result.stderr


def test_interrupted_transfer_is_resumed_or_retried(hub, export, tmp_path):
    hub.add("org/once", files(export))
    hub.fault["org/once"] = "once"
    hub.add("org/always", files(export))
    hub.fault["org/always"] = "always"
    code = (
        ERRORS
        + """
import os, pathlib, urllib.request
load(checkpoint="org/once")
error("transfer failed", "Try again", checkpoint="org/always")
assert not list(pathlib.Path(os.environ["HF_HOME"]).rglob("models--org--always/snapshots/*/model.safetensors"))
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mend")
load(checkpoint="org/always")
"""
    )
    result = client(hub, tmp_path, code)
    assert result.returncode == 0, result.stderr


def test_release_on_the_hub_is_checked_against_the_registry(hub, export, tmp_path):
    hub.add("org/release", files(export))
    shutil.copytree(ROOT / "uscl_hub", tmp_path / "p/uscl_hub", ignore=shutil.ignore_patterns("__pycache__"))
    entry = {"file": None, "px": 72, "licence": "cc-by-4.0", "hub_id": "org/release"}
    registry = {
        "meta_uscl_resnet18.good": {**entry, "sha256": checkpoints.sha256(export / "model.safetensors")},
        "meta_uscl_resnet18.wrong": {**entry, "sha256": "0" * 64},
    }
    (tmp_path / "p/uscl_hub/weights/registry.json").write_text(json.dumps(registry))
    code = """
import timm
assert timm.list_pretrained("meta_uscl*") == ["meta_uscl_resnet18.good", "meta_uscl_resnet18.wrong"]
timm.create_model("meta_uscl_resnet18", pretrained=True, num_classes=2); load(checkpoint="good")
try: load(checkpoint="wrong")
except uscl_hub.checkpoints.CheckpointError as e: assert "SHA-256" in str(e) and "model.safetensors" in str(e)
else: raise SystemExit("wrong hash taken")
"""
    result = client(hub, tmp_path, code, PYTHONPATH=str(tmp_path / "p"))
    assert result.returncode == 0, result.stderr


def test_push(hub, export, tmp_path):
    make_export(tmp_path / "bad", 1)
    (tmp_path / "bad/model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:-4])
    make_export(tmp_path / "cardless", 1)
    (tmp_path / "cardless/README.md").unlink()
    (export / "secret.txt").write_text("not to be shared")
    code = """
from uscl_hub.cli import main
assert main(["push", "bad", "org/bad"]) == 1
assert main(["push", "cardless", "org/cardless"]) == 1
assert main(["push", sys.argv[1], "org/../new"]) == 1
assert main(["push", sys.argv[1], "org/new", "--json"]) == 0
load(checkpoint="org/new")  # and back again
"""
    hub.log.clear()
    result = client(hub, tmp_path, code, export, HF_TOKEN="hf_secret")
    (export / "secret.txt").unlink()
    assert result.returncode == 0, result.stderr
    for word in ("bad/model.safetensors", "not shared without its model card", "not a Hub id"):
        assert word in result.stderr
    assert not any("bad" in line or "cardless" in line for line in hub.log)  # checked before any request
    assert json.loads(result.stdout)["url"].startswith(hub.url)
    entry = hub.repos["org/new"]
    assert entry["commits"][entry["refs"]["main"]] == files(export)

    code = 'from uscl_hub.cli import main\nraise SystemExit(main(["push", *sys.argv[1:]]))'
    result = client(hub, tmp_path, code, export, "org/new2")
    assert result.returncode == 1 and "hf auth login" in result.stderr and "Traceback" not in result.stderr
    assert "org/new2" not in hub.repos


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["file", "folder", "chain", "pipe", "device"])
def test_push_sends_nothing_from_elsewhere(hub, export, tmp_path, monkeypatch, name, kind):
    """What a link leads to outside of the folder, and what is no file, stays here; nothing at all is sent."""
    folder, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(export, folder)
    outside.mkdir()
    (folder / name).rename(outside / "private")
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "chain":
        (folder / "inside").symlink_to(outside / "private")
        (folder / name).symlink_to("inside")
    else:
        target = {"file": outside / "private", "folder": outside, "device": "/dev/zero"}[kind]
        (folder / name).symlink_to(target)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **kwargs: pytest.fail("the Hub was asked"))
    with pytest.raises(CheckpointError, match=f"{name}: is a"):
        push(folder, "org/new")


def test_push_of_links_within_the_folder(export, tmp_path, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, *arguments, **kwargs):
            pass

        def create_commit(self, repo, files, **kwargs):
            sent.update({file.path_in_repo: Path(file.path_or_fileobj).read_bytes() for file in files})
            return SimpleNamespace(commit_url="https://hub/org/new")

    shutil.copytree(export, tmp_path / "out")
    (tmp_path / "out/README.md").rename(tmp_path / "out/card.md")
    (tmp_path / "out/README.md").symlink_to("card.md")
    (tmp_path / "link").symlink_to("out")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push(tmp_path / "link", "org/new") == "https://hub/org/new"
    assert sent == files(export)


@pytest.mark.parametrize("token", ["hf_abc\u2026", "hf_\u00e4", "hf_abc def", "\u201chf_abc\u201d", "hf_\x07"])
def test_a_token_that_cannot_be_one(hub, export, tmp_path, token):
    code = (
        ERRORS
        + """
error("token", "HF_TOKEN", "hf auth login", checkpoint="org/good")
from uscl_hub.cli import main
assert main(["push", sys.argv[1], "org/new"]) == 1 and main(["info", "org/good"]) == 1
"""
    )
    hub.log.clear()
    result = client(hub, tmp_path, code, export, HF_TOKEN=token)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("uscl-hub: ")]
    assert len(lines) == 2 and all("HF_TOKEN" in line for line in lines) and hub.log == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "utf-16", "latin-1", "below a file"])
def test_a_token_file_that_cannot_be_read(hub, tmp_path, kind):
    home = tmp_path / "home"
    home.mkdir()
    if kind == "pipe":
        os.mkfifo(home / "token")
    elif kind == "folder":
        (home / "token").mkdir()
    elif kind == "below a file":
        home.rmdir()
        home.write_text("x")
    else:
        (home / "token").write_bytes("hf_\u00e9t".encode(kind))
    code = ERRORS + 'error("org/good", "token", "HF_TOKEN", checkpoint="org/good")'
    hub.log.clear()
    result = client(hub, tmp_path, code, HF_HOME=str(home), HF_TOKEN_PATH=str(home / "token"))
    assert result.returncode == 0, result.stderr
    assert hub.log == []


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "ftp://127.0.0.1:9", "http://a b"])
def test_an_endpoint_that_is_none(hub, tmp_path, endpoint):
    code = ERRORS + 'error("org/good", checkpoint="org/good")'
    result = client(hub, tmp_path, code, HF_ENDPOINT=endpoint)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", ["runs/export", "runs/gone", "./org/name", "org/model.safetensors", "~/x", "/a/b"])
def test_the_hub_is_never_asked_for_a_path(hub, tmp_path, path):
    (tmp_path / "runs").mkdir()
    code = """
import pathlib
def refused(what, **more):
    try: load(checkpoint=what, **more)
    except (uscl_hub.checkpoints.CheckpointError, ValueError) as e: return str(e)
    raise SystemExit("loaded")
path = sys.argv[1]
assert path in refused(path) and path.lstrip("./") in refused(pathlib.Path(path))
refused(pathlib.Path("org/name"))
from uscl_hub.cli import main
assert main(["verify", path]) == main(["info", path]) == main(["export", path, "-o", "x", "--format", "onnx"]) == 1
"""
    hub.log.clear()
    result = client(hub, tmp_path, code, path)
    assert result.returncode == 0, result.stderr
    assert hub.log == []


def test_a_checkpoint_found_again_from_elsewhere(export, tmp_path, monkeypatch):
    shutil.copytree(export, tmp_path / "runs/export")
    monkeypatch.chdir(tmp_path)
    found = sources.settle("runs/export")
    monkeypatch.chdir("/")
    assert found == str(tmp_path / "runs/export") and sources.find(found).folder == tmp_path / "runs/export"
    for other in (None, "nc", "meta_uscl_resnet18.nc", "hf-hub:org/name"):
        assert sources.settle(other) == other
    assert sources.settle("org/name") == "hf-hub:org/name"


def test_a_repository_beyond_doubt(hub, export, tmp_path):
    first = hub.add("runs/export", files(export))
    hub.add("runs/export", files(make_export(tmp_path / "newer", 2)))
    (tmp_path / "runs").mkdir()  # which "runs/export" would be taken to be in
    code = """
a = load(checkpoint="hf-hub:runs/export@" + sys.argv[1])
b = load(checkpoint="hf-hub:runs/export", revision=sys.argv[1])
assert torch.equal(a.conv1.weight, b.conv1.weight)
assert not torch.equal(a.conv1.weight, load(checkpoint="hf-hub:runs/export").conv1.weight)
"""
    result = client(hub, tmp_path, code, first)
    assert result.returncode == 0, result.stderr
