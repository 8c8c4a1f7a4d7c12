"""Pretrained tags: what is downloaded, that it is verified, what is said where it cannot be; all without a network."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

import zoo
from builds import same, state_of, timm_state, trained
from families import SMALL
from zoo import fetch
from zoo.errors import plain_warnings
from zoo.inspect import inspect
from zoo.releases import RELEASES, find

MODEL = "maxvit_t_tv"

# a warning that a test does not expect is an error
pytestmark = pytest.mark.filterwarnings("error::zoo.LicenceWarning")


def small(name, **kwargs):
    """A model by its name or tag, of the size of the small one of its family."""
    model = name.partition(".")[0]
    args = SMALL["gcvit_s" if model.startswith("gcvit") else model]
    return timm.create_model(name, **{"num_classes": 7, **args, **kwargs})


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing leaves this machine, no cache of the user's is touched, and no licence was spoken of yet."""
    connect = socket.socket.connect

    def local(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] != "127.0.0.1":
            raise OSError(f"no network here: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(fetch, "_warned", set())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "torch" / "hub" / "checkpoints"


class Site:
    """Files of a folder on 127.0.0.1, and which of them were asked for."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []
        site = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args):
                site.asked.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    site = Site(folder)
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_any(path):
    """Write a small weights file."""
    torch.save({"weight": torch.zeros(3)}, path)


def kept(cache):
    """The files in the cache, without those that are locked while something is downloaded."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def layout_of(model, name):
    return next(layout for layout in zoo.checkpoint.layouts_of(type(model)) if layout.name == name)


def released(monkeypatch, name, **changed):
    """The table of releases with one row changed: what is served here has another digest than what was released."""
    row = find(name)
    table = tuple(replace(r, **changed) if r is row else r for r in RELEASES)
    monkeypatch.setattr(fetch, "RELEASES", table)


def test_nothing_is_fetched_unless_asked(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("something was fetched")

    for place in ("torch.hub.download_url_to_file", "huggingface_hub.hf_hub_download", "socket.socket.connect"):
        monkeypatch.setattr(place, never)
    for name in ("gcvit_xxt.nvidia_in1k", "maxvit_t_tv.tv_in1k", "davit_t", "biformer_t.rayleizhu_in1k"):
        with torch.device("meta"):
            timm.create_model(name)
        assert timm.models.get_pretrained_cfg(name).num_classes == 1000


@pytest.mark.parametrize("release", [r for r in RELEASES if r.loadable], ids=lambda r: r.name)
def test_the_last_map_of_a_configuration_is_of_its_images(release):
    cfg = timm.models.get_pretrained_cfg(release.name)
    side = -(-release.img_size // zoo.registry.class_of(release.model).reduction)
    assert (cfg.input_size, cfg.pool_size) == ((3, release.img_size, release.img_size), (side, side))


def test_a_tag_is_downloaded_verified_converted_and_loaded(monkeypatch, site, cache):
    """Over HTTP, in the released layout under the released name; the second time from the cache."""
    source = trained(small(MODEL))
    file = site.folder / "maxvit_t-bc5ab103.pth"
    torch.save(timm_state(source), file)
    release = find("maxvit_t_tv.tv_in1k")
    released(monkeypatch, release.name, url=f"{site.url}/{file.name}", sha256=sha256(file)[:8])
    overlay = {"url": f"{site.url}/{file.name}"}
    for _ in range(2):
        model = small(release.name, pretrained=True, pretrained_cfg_overlay=overlay)
        assert same(model, state_of(source))
    assert len(site.asked) == 1 and kept(cache) == [cache / file.name]


def test_released_urls_are_what_is_asked_for(monkeypatch):
    asked = []

    def download(url, path, *args, **kwargs):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    for name in ("maxvit_t_tv.tv_in1k", "dinat_t", "litv2_s_a02", "gcvit_xt.timm_in1k"):
        with pytest.raises(zoo.CheckpointError):
            timm.create_model(name, pretrained=True)
    assert asked == [find(name).url for name in ("maxvit_t_tv", "dinat_t", "litv2_s_a02", "gcvit_xt.timm_in1k")]


def test_another_file_than_was_released(site, cache):
    file = site.folder / "maxvit_t-bc5ab103.pth"
    torch.save(timm_state(small(MODEL)), file)
    overlay = {"url": f"{site.url}/{file.name}"}
    message = rf"its SHA-256 is {sha256(file)}, expected bc5ab103\.\.\..*"
    with pytest.raises(zoo.CheckpointError, match=message + "the download was deleted"):
        small(MODEL, pretrained=True, pretrained_cfg_overlay=overlay)
    assert not kept(cache)
    # what somebody else put there is theirs
    (cache / file.name).write_bytes(file.read_bytes())
    with pytest.raises(zoo.CheckpointError, match=message + "delete it to download it again"):
        timm.create_model("maxvit_t_tv.tv_in1k", pretrained=True)
    assert sha256(cache / file.name) == sha256(file) and len(site.asked) == 1


def outcome(url):
    try:
        return fetch.locate({"url": url}, MODEL)
    except Exception as error:
        return type(error)


def test_one_process_downloads_and_the_others_wait(monkeypatch, site, cache):
    """Threads stand for processes; what is not what was released is at no time under its name, and each reports it."""
    download, digest_of, found = torch.hub.download_url_to_file, fetch.digest_of, []
    good, bad = (site.folder / name for name in ("good.pth", "bad-bc5ab103.pth"))

    def slow(*args, **kwargs):
        time.sleep(0.1)
        return download(*args, **kwargs)

    def digest(path):
        found.append((cache / bad.name).exists())
        return digest_of(path)

    monkeypatch.setattr("torch.hub.download_url_to_file", slow)
    monkeypatch.setattr(fetch, "digest_of", digest)
    with ThreadPoolExecutor(3) as ranks:
        for file, expected in ((good, cache / good.name), (bad, zoo.CheckpointError)):
            save_any(file)
            assert list(ranks.map(outcome, [f"{site.url}/{file.name}"] * 3)) == [expected] * 3
    assert site.asked == [f"/{good.name}"] + [f"/{bad.name}"] * 3
    assert found == [False] * 3 and kept(cache) == [cache / good.name]


HOLDER = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"


def test_waiting_for_a_download_ends_with_ctrl_c_or_with_the_process_that_downloads(site, cache):
    save_any(site.folder / "a.pth")
    cache.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(cache / ".a.pth.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        ctrl_c = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        ctrl_c.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                fetch.locate({"url": f"{site.url}/a.pth"}, MODEL)
        finally:
            ctrl_c.cancel()
        assert not site.asked
        holder.kill()
    assert sha256(fetch.locate({"url": f"{site.url}/a.pth"}, MODEL)) == sha256(site.folder / "a.pth")


def broken_off(listener, response):
    """Answer one request with a response that ends before it is complete."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(2**16)
        connection.sendall(response)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("Content-Length: 1000000", r"what {url} sent \([\d,]+ bytes\) is a truncated .*; the download was deleted"),
        ("Transfer-Encoding: chunked", r"could not download {url} \(IncompleteRead: .*Download it by other means"),
    ],
    ids=["length", "chunked"],
)
def test_a_download_that_breaks_off_is_not_kept(header, said, tmp_path, cache):
    """Also where nobody knows the file's SHA-256, as of most releases."""
    save_any(tmp_path / "whole.pth")
    sent = (tmp_path / "whole.pth").read_bytes()[:-200]
    start = b"%x\r\n" % (len(sent) + 200) if "chunked" in header else b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/w.pth"
        response = b"HTTP/1.1 200 OK\r\n%s\r\n\r\n%s%s" % (header.encode(), start, sent)
        server = threading.Thread(target=broken_off, args=(listener, response))
        server.start()
        with pytest.raises(zoo.CheckpointError, match=said.format(url=re.escape(url))):
            fetch.locate({"url": url}, MODEL)
        server.join()
    assert not kept(cache)


def test_what_is_no_url():
    with pytest.raises(zoo.CheckpointError, match=r"could not download gcvit\.pth \(ValueError: unknown url type"):
        fetch.locate({"url": "gcvit.pth"}, MODEL)


def test_files_of_models_that_are_not_ours_are_verified_as_of_no_release(hub):
    """The row of timm's own model has another file's digest."""
    files, _ = hub
    files["timm/maxvit_tiny_rw_224.sw_in1k/model.safetensors"] = lambda path: save_file({"a": torch.zeros(1)}, path)
    assert any(r.foreign and r.sha256 and r.hub_id == "timm/maxvit_tiny_rw_224.sw_in1k" for r in RELEASES)
    assert fetch.locate({"hf_hub_id": "timm/maxvit_tiny_rw_224.sw_in1k"}, MODEL).name == "model.safetensors"


def test_names_that_only_look_like_digests(site):
    source = trained(small(MODEL))
    for name in ("model-224.pth", "model-cafe.pth", "model-20230131.pth"):
        torch.save(state_of(source), site.folder / name)
        assert same(
            small(MODEL, pretrained=True, pretrained_cfg_overlay={"url": f"{site.url}/{name}"}), state_of(source)
        )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the files that a test puts into it: "repository/name" -> what writes it."""
    files, asked = {}, []

    def download(repository, name, **kwargs):
        asked.append((repository, name))
        path = tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / "0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            files[f"{repository}/{name}"](path)
        return path

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return files, asked


PORTS = {
    "maxvit_t.timm_tf_in1k": "timm/maxvit_tiny_tf_224.in1k",
    "davit_t.timm_msft_in1k": "timm/davit_tiny.msft_in1k",
}


@pytest.mark.parametrize("name", PORTS)
def test_ports_come_from_the_hub(hub, name):
    files, asked = hub
    source = trained(small(name))
    state = layout_of(source, "timm").to_theirs(source.state_dict())
    files[f"{PORTS[name]}/model.safetensors"] = lambda path: save_file(state, path)
    model = timm.create_model(name, pretrained=True, **SMALL[name.partition(".")[0]])
    assert asked == [(PORTS[name], "model.safetensors")]
    assert model.num_classes == source.num_classes and same(model, state_of(source))


def test_hub_files_are_verified(monkeypatch, hub):
    """GC ViT's own file: its digest is the table's, its licence is named, once."""
    files, asked = hub
    source, name = trained(small("gcvit_xt")), "gcvit_xt.nvidia_in1k"
    official = layout_of(source, "official")
    written = []

    def write(path):
        torch.save({"state_dict": official.to_theirs(source.state_dict()), "epoch": 3}, path)
        written.append(path)

    files["nvidia/GCViT/gcvit_1k_xtiny.pth.tar"] = write
    with pytest.raises(
        zoo.CheckpointError, match=r"expected d7754bac609e72e3.*delete it to download it again"
    ) as error:
        small(name, pretrained=True)
    assert asked == [("nvidia/GCViT", "gcvit_1k_xtiny.pth.tar")] and written[0].exists()
    assert sha256(written[0]) in str(error.value)
    released(monkeypatch, name, sha256=sha256(written[0]))
    with pytest.warns(zoo.LicenceWarning, match=r"gcvit_xt\.nvidia_in1k.*cc-by-nc-sa-4\.0, forbids commercial use"):
        model = small(name, pretrained=True)
    assert same(model, state_of(source))
    small(name, pretrained=True)  # a second warning would be an error


def test_what_the_hub_says_of_a_file(monkeypatch, tmp_path):
    """Large files lie in the hub's cache under their digest; the error names the blob, which the link leads back to."""
    source = trained(small("davit_t"))
    save_file(state_of(source), tmp_path / "whole")
    blob, link = tmp_path / "blobs" / sha256(tmp_path / "whole"), tmp_path / "snapshots" / "model.safetensors"
    for folder in (blob.parent, link.parent):
        folder.mkdir()
    link.symlink_to(blob)
    blob.write_bytes((tmp_path / "whole").read_bytes())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(link))
    assert same(small("davit_t", pretrained=True), state_of(source))
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(zoo.CheckpointError, match=f"{blob} is not the released file.* expected {blob.name}.*delete it"):
        small("davit_t", pretrained=True)
    assert blob.exists()


def test_licence_of_a_file(tmp_path):
    """A file that has kept its name is known, by timm's way and by ours; other files and other licences say nothing."""
    model, file = timm.create_model("gcvit_xxt"), tmp_path / "gcvit_1k_xxtiny.pth.tar"
    build = partial(timm.create_model, "gcvit_xxt", pretrained=True)
    for name in (file.name, "mine.pth", "maxvit_t-bc5ab103.pth", "gcvit_1k_tiny.pth.tar"):
        torch.save(model.state_dict(), tmp_path / name)
    for load in (partial(zoo.load_checkpoint, model), lambda file: build(pretrained_cfg_overlay={"file": str(file)})):
        fetch._warned.clear()
        with pytest.warns(zoo.LicenceWarning, match="gcvit_xxt.nvidia_in1k"):
            load(file)
        for name in (file.name, "mine.pth", "maxvit_t-bc5ab103.pth", "gcvit_1k_tiny.pth.tar"):
            load(tmp_path / name)


def test_licence_goes_by_what_a_file_holds(tmp_path):
    """Another model in a file with the name of a release is not that release."""
    file, model = tmp_path / "gcvit_1k_tiny.pth", timm.create_model("davit_t", num_classes=7)
    torch.save(model.state_dict(), file)
    zoo.load_checkpoint(model, file)
    timm.create_model("davit_t", num_classes=7, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert inspect(file)["release"] is None


def test_licence_of_a_converted_file(tmp_path):
    """By what was written into it; files of older versions only have the name of the one that they were made from."""
    model, file = timm.create_model("gcvit_xxt"), tmp_path / "x.safetensors"
    release, source = {"release": "gcvit_xxt.nvidia_in1k"}, {"source": "gcvit_1k_xxtiny.pth.tar"}
    for metadata in (release, source, release | {"source": "x.safetensors"}):
        save_file(model.state_dict(), file, metadata)
        fetch._warned.clear()
        with pytest.warns(zoo.LicenceWarning, match="gcvit_xxt.nvidia_in1k"):
            zoo.load_checkpoint(model, file)
    fetch._warned.clear()
    for metadata in (
        {"release": "gcvit_t.nvidia_in1k"},
        {"release": "gcvit_xxt"},
        {"release": "", "source": "http://[x"},
    ):
        save_file(model.state_dict(), file, metadata)
        zoo.load_checkpoint(model, file)
    save_file(model.state_dict(), file, {"source": f"a{' ' * 300_000}b"})
    begun = time.perf_counter()
    assert fetch.by_name(file, zoo.describe(file).meta) == [] and time.perf_counter() - begun < 1


def test_commands_print_licences_plainly(tmp_path):
    """One line on standard error, without the line of code that it comes from."""
    source, out = tmp_path / "gcvit_1k_xxtiny.pth.tar", tmp_path / "x.safetensors"
    torch.save(timm.create_model("gcvit_xxt").state_dict(), source)
    command = [sys.executable, "-m", "zoo.convert", str(source), str(out)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.splitlines()[0].startswith("gcvit_xxt.nvidia_in1k: the licence of these weights, ")
    assert "LicenceWarning" not in said
    other = warnings.formatwarning("else", UserWarning, "file", 3)
    with plain_warnings():
        assert warnings.formatwarning("else", UserWarning, "file", 3) == other


def test_an_overlay_goes_before_the_tag(hub, site):
    files, asked = hub
    source = trained(small("gcvit_xxt"))
    files["me/mine/model.safetensors"] = lambda path: save_file(source.state_dict(), path)
    torch.save(source.state_dict(), site.folder / "mine.pth")
    for overlay in ({"hf_hub_id": "me/mine"}, {"url": f"{site.url}/mine.pth"}):
        assert same(small("gcvit_xxt", pretrained=True, pretrained_cfg_overlay=overlay), state_of(source))
    assert asked == [("me/mine", "model.safetensors")] and len(site.asked) == 1


def test_offline(monkeypatch, cache):
    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("nothing in the cache\nand no network")

    where = r"could not download https://download\.pytorch\.org/models/maxvit_t-bc5ab103\.pth .*put it at "
    with pytest.raises(zoo.CheckpointError, match=f"{where}{cache / 'maxvit_t-bc5ab103.pth'}.*dict\\(file="):
        timm.create_model("maxvit_t_tv", pretrained=True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    where = r"could not download https://huggingface\.co/timm/davit_tiny\.msft_in1k/resolve/main/model\.safetensors"
    with pytest.raises(zoo.CheckpointError, match=where + r".*nothing in the cache\)\. Download it .*dict\(file="):
        timm.create_model("davit_t", pretrained=True)
    where = r"could not download https://huggingface\.co/nvidia/GCViT/resolve/main/gcvit_1k_tiny\.pth\.tar"
    with pytest.raises(zoo.CheckpointError, match=where):
        timm.create_model("gcvit_t", pretrained=True)


def test_an_error_without_a_message(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(zoo.CheckpointError, match=r"\(OSError: \)"):
        timm.create_model("maxvit_t_tv", pretrained=True)


def test_by_hand(monkeypatch, cache):
    """Nothing is fetched from a page for browsers; a file that was put where the message says is loaded."""
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *args, **kwargs: pytest.fail("fetched"))
    message = (
        r"open https://1drv\.ms/\S+ \(or https://matix\.li/e36fe9fb086c\), download biformer_tiny_best\.pth, and put "
        "it at "
    )
    with pytest.raises(zoo.CheckpointError, match=rf"{message}{cache / 'biformer_tiny_best.pth'}, or pass .*file="):
        small("biformer_t", pretrained=True)
    with pytest.raises(zoo.CheckpointError, match=r"sgformer_m\.oliverren_in1k.*download its file, and pass"):
        timm.create_model("sgformer_m", pretrained=True)
    source = trained(small("biformer_t"))
    state = layout_of(source, "official").to_theirs(source.state_dict())
    torch.save({"model": state}, cache / "biformer_tiny_best.pth")
    assert same(small("biformer_t", pretrained=True), state_of(source))


@pytest.mark.parametrize("release", [r for r in RELEASES if r.by_hand and r.loadable], ids=lambda r: r.name)
def test_pages_for_browsers_are_in_no_configuration(release):
    cfg = timm.models.get_pretrained_cfg(release.name)
    assert not cfg.has_weights and cfg.origin_url == release.url


def test_nothing_to_download():
    with pytest.raises(zoo.CheckpointError, match="davit_l has no released weights"):
        timm.create_model("davit_l", pretrained=True)
    with pytest.raises(zoo.CheckpointError, match="maxvit_t has no released weights"):
        small("maxvit_t", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": None, "url": None})
