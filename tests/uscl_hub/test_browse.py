"""`uscl-hub browse`: what is shown, and that a real browser shows it."""

import base64
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import ROOT
from PIL import Image

from uscl_hub import cli
from uscl_hub.browse import browse, joined, nearest, read
from uscl_hub.errors import UserError
from uscl_hub.features.embed import embed


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two folders of images: bright ones and dark ones."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "scans"
    for kind, level in (("bright", 200), ("dark", 20)):
        (root / kind).mkdir(parents=True)
        for name in "abcdefgh":
            pixels = rng.integers(0, 50, (60, 80)) + level
            Image.fromarray(pixels.astype(np.uint8)).save(root / kind / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def table(scans, tiny_export, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "f.parquet"
    embed([scans], out, name="test_resnet", checkpoint=tiny_export, progress=False)
    return out


def predictions(scans, path, per=""):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "clip", "frame", "frames", "p_bright", "p_dark", "label", "entropy"])
        for file in sorted(scans.rglob("*.png")):
            p = 0.9 if file.parent.name == "bright" else 0.2
            clip = file.relative_to(scans.parent).as_posix()
            writer.writerow([file, clip, per, 1, p, 1 - p, "bright" if p > 0.5 else "dark", 0.3])
    return path


@pytest.mark.parametrize(
    "texts, shown",
    [
        (["1", "2.5", "-3e2"], [1, 2.5, -300]),
        (["0", "0.5", "-0.25"], [0, 0.5, -0.25]),
        (["007", "12", "3"], ["007", "12", "3"]),
        (["1_2", "3", "4"], ["1_2", "3", "4"]),
    ],
)
def test_numbers_are_columns_of_numbers_and_ids_are_not(tmp_path, texts, shown):
    (tmp_path / "more.csv").write_text("clip,more\n" + "".join(f"{i},{text}\n" for i, text in zip("abc", texts)))
    assert joined(["a", "b", "c"], tmp_path / "more.csv") == {"more": shown}


def test_a_table_of_embed(table):
    columns, vectors = read(table)
    ids = [row["clip"] for row in pq.read_table(table).to_pylist() if row["level"] == "clip"]
    assert columns["clip"] == ids and vectors.shape[0] == 16 and vectors.dtype == np.float32
    assert set(columns["folder"]) == {"scans/bright", "scans/dark"}
    texts, strips = nearest(columns["clip"], vectors, columns["picture"])
    assert all(name not in text for name, text in zip(columns["clip"], texts))  # not itself
    assert all(text.count("scans/bright") == 5 for text, f in zip(texts, columns["folder"]) if f == "scans/bright")
    assert len(strips) == 16


@pytest.mark.parametrize("per", ["", "0"])
def test_a_table_of_predict(scans, tmp_path, per):
    columns, vectors = read(predictions(scans, tmp_path / "p.csv", per))
    assert vectors.shape == (16, 2) and columns["label"].count("dark") == 8 and "path" not in columns
    assert columns["entropy"][0] == 0.3 and all(picture.startswith(b"\x89PNG") for picture in columns["picture"])
    shutil.copy(scans / "dark" / "a.png", tmp_path / "a.png")
    (tmp_path / "gone.csv").write_text("path,clip,frame,frames,p_a\n/nowhere/x.png,x.png,,1,0.5\n")
    columns, _ = read(tmp_path / "gone.csv")  # its picture is grey
    assert columns["clip"] == ["x.png"] and len(columns["picture"]) == 1


def test_columns_of_another_table(scans, tmp_path):
    clips = ["scans/bright/a.png", "scans/dark/a.png", "scans/dark/b.png"]
    given = joined(clips, predictions(scans, tmp_path / "p.csv"))
    assert given["label"] == ["bright", "dark", "dark"] and given["p_dark"] == pytest.approx([0.1, 0.8, 0.8])
    (tmp_path / "labels.csv").write_text("path,label,age\ndark/a.png,cyst,30\nbright/a.png,normal,\n")
    given = joined(clips, tmp_path / "labels.csv")
    assert given["label"] == ["normal", "cyst", ""] and given["age"][1] == 30 and np.isnan(given["age"][0])
    (tmp_path / "nfd.csv").write_text("path,label\nbrust/u\u0308bung.png,cyst\n", encoding="utf-8")
    assert joined(["brust/\u00fcbung.png"], tmp_path / "nfd.csv") == {"label": ["cyst"]}
    wrong = (("name,label\na,b\n", "neither a column clip nor path"), ("path,label\nx/y.png,b\n", "none of"))
    for text, words in wrong:
        (tmp_path / "wrong.csv").write_text(text)
        with pytest.raises(UserError, match=f"wrong.csv: .*{words}"):
            joined(clips, tmp_path / "wrong.csv")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("gone.parquet", None, "no such file"),
        ("bad.parquet", b"PAR1 no table", "is not a feature table"),
        ("labels.csv", b"path,label\na.png,b\n", "has no column clip"),
        ("words.csv", b"path,clip,frame,frames,mask\na.png,a.png,,1,m.png\n", "no column of predicted numbers"),
        ("nan.csv", b"path,clip,frame,frames,p_a\na.png,a.png,,1,inf\n", "not finite"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_wrong_arguments(table, monkeypatch, capsys):
    pytest.importorskip("renumics.spotlight")
    with pytest.raises(UserError, match="--colour age: there is no such column; there are clip, folder"):
        browse(table, colour="age")
    assert cli.main(["browse", str(table), "--port", "99999"]) == 1
    assert "--port 99999: cannot be used" in capsys.readouterr().err


def test_without_the_extra(table, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "renumics", None)
    assert cli.main(["browse", str(table)]) == 1
    assert "pip install 'uscl-hub[browse]'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def served(table, tmp_path):
    """The address of the page, and the process."""
    pytest.importorskip("renumics.spotlight")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "uscl_hub.cli", "browse", str(table), "--no-browser"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert "16 clips; Ctrl-C ends it" in line
    address = line.split(": ")[0]
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).read()
            break
        except OSError:
            time.sleep(0.2)
    yield address, process
    process.terminate()  # not kill: its server would stay
    process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_server(served, number):
    address, process = served
    assert address.startswith("http://127.0.0.1:")
    process.send_signal(number)
    assert process.wait(60) == 0
    with pytest.raises(OSError):  # the server has gone with it
        urllib.request.urlopen(address, timeout=5)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Chromium without a window, by its DevTools protocol."""

    def __init__(self, folder):
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader"]
        flags += ["--enable-unsafe-swiftshader", "--window-size=1400,800", "--remote-debugging-port=0"]
        command = [CHROMIUM, *flags, f"--user-data-dir={folder}", "about:blank"]
        self.held = contextlib.ExitStack()
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.held.callback(self.process.wait)
        self.held.callback(self.process.kill)
        said, end = folder / "DevToolsActivePort", time.monotonic() + 120
        while not (said.exists() and len(said.read_text().split()) == 2):
            assert time.monotonic() < end
            time.sleep(0.1)
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{said.read_text().split()[0]}/json"))
        from websockets.sync.client import connect

        address = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"]
        self.socket = self.held.enter_context(connect(address, max_size=None))
        self.count, self.asked = 0, []
        self.call("Network.enable")

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(60))
            if message.get("method") == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            if message.get("id") == self.count:
                return message.get("result", {})

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression, seconds=180):
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.5)
        return found

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_points_and_pictures(served, tmp_path):
    pytest.importorskip("websockets")
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=served[0])
        browser.until("document.body?.innerText.includes('16 of 16 rows')")  # the map is there
        assert browser.value("document.body.innerText.includes('scans/bright')")
        cell = "[...document.querySelectorAll('*')].filter(e => e.children.length == 0 && e.innerText == '{}')"
        place = cell.format("scans/dark/a.png") + "[0].getBoundingClientRect()"
        x, y = browser.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place})")
        browser.click(x, y)
        sizes = "[...document.querySelectorAll('img')].map(i => [i.naturalWidth, i.naturalHeight].join('x'))"
        browser.until(f"{sizes}.includes('96x96') && {sizes}.includes('480x96')")  # the clip, and its neighbours
        shot = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
        (tmp_path / "shot.png").write_bytes(shot)
        colours = np.asarray(Image.open(tmp_path / "shot.png").convert("HSV"))[..., 1][:, :800]
        assert (colours > 120).sum() > 200  # coloured points on the map
        hosts = {url.split("/")[2] for url in browser.asked if url.startswith(("http", "ws"))}
        assert hosts == {served[0].removeprefix("http://")}  # nothing is loaded from elsewhere
    finally:
        browser.held.close()
