"""Hub ids against a stand-in for the hub on 127.0.0.1, each in a process of its own: the hub client reads its
environment when it is imported."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

MODEL, RETIRED, SUCCESSOR = (
    "someone/model",
    "runwayml/stable-diffusion-v1-5",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Hub:
    """The repositories that the stand-in serves, its faults, and what it was asked."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)  # Authorization of the requests about repositories
    cuts: Counter[str] = field(default_factory=Counter)  # file → how many of its downloads break off half-way
    corrupt: Counter[str] = field(default_factory=Counter)  # file → how many of its downloads have a wrong byte
    requests: list[str] = field(default_factory=list)

    def downloads(self, name: str) -> int:
        return sum(line.startswith("GET") and line.endswith(name) for line in self.requests)


def digests(content: bytes) -> tuple[str, str]:
    """The hub's ids of a file: git's blob SHA-1, and the SHA-256 that large files go by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.requests.append(f"{self.command} {path}")
            hub.tokens |= {self.headers.get("Authorization")} if path.startswith("/api/models") else set()
            match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(/(?:revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
            repo = match[1] if match else ""
            if repo in hub.gated:
                return self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            if repo not in hub.repos:
                return self.answer(401, {"error": "no"}, {"X-Error-Message": "Invalid username or password."})
            if match[3] not in (None, "main", COMMIT):
                return self.answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
            files = hub.repos[repo]
            if path.startswith("/api") and "/tree/" in path:
                return self.answer(200, [self.entry(name, content) for name, content in files.items()])
            if path.startswith("/api"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, {"id": repo, "sha": COMMIT, "siblings": siblings})
            return self.file(match[4], files[match[4]])

        do_HEAD = do_GET  # noqa: N815

        def entry(self, name: str, content: bytes) -> dict[str, Any]:
            sha1, sha256 = digests(content)
            entry = {"type": "file", "path": name, "size": len(content), "oid": sha1}
            lfs = {"oid": sha256, "size": len(content), "pointerSize": 130}
            return entry | ({"lfs": lfs} if name.endswith(".safetensors") else {})

        def file(self, name: str, content: bytes) -> None:
            sha1, sha256 = digests(content)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1}"', "Accept-Ranges": "bytes"}
            if name.endswith(".safetensors"):
                headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            start = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
            if self.command == "GET" and hub.corrupt[name]:
                hub.corrupt[name] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            body = content[start:]
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = self.command == "GET" and hub.cuts[name] > 0
            hub.cuts[name] -= cut
            self.start(206 if start else 200, headers | {"Content-Length": str(len(body))})
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

        def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.start(status, (headers or {}) | {"Content-Type": "application/json", "Content-Length": str(len(body))})
            if self.command == "GET":
                self.wfile.write(body)

        def start(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The demo checkpoint as a repository, with files that no export needs."""
    from sd_export.source.resolve import DEMO_FOLDER

    names = [path.relative_to(DEMO_FOLDER).as_posix() for path in DEMO_FOLDER.rglob("*") if path.is_file()]
    return {name: (DEMO_FOLDER / name).read_bytes() for name in names} | {
        "v1-5-pruned.ckpt": b"pickle",
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"not wanted",
    }


@pytest.fixture
def resolve(hub, tmp_path):
    """resolve(model, revision=None, **environment) → the Checkpoint's fields, or {"error": …}, and {"log": …}."""

    def run(
        model: str,
        revision: str | None = None,
        prelude: str = "",
        then: str = "",
        safety_checker: bool = True,
        **environment: str,
    ) -> dict[str, Any]:
        code = f"""
import json, sys
{prelude}
from sd_export.source import resolve_checkpoint, with_taesd, with_vae
from sd_runtime.errors import SDError
try:
    c = resolve_checkpoint({model!r}, revision={revision!r}, safety_checker={safety_checker})
    {then}
    out = dict(id=c.id, name=c.name, revision=c.revision, files=dict(c.files))
    out["parts"] = {{name: [part.id, part.revision, *part.files] for name, part in c.parts.items()}}
    out["weights"] = {{network: str(path) for network, (path,) in c.weights.items()}}
except SDError as error:
    out = dict(error=str(error), kind=type(error).__name__)
print(json.dumps(out | dict(torch="torch" in sys.modules)))
"""
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "PYTHONPATH": ":".join(sys.path)} | environment
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        out = json.loads(done.stdout)
        assert not out.pop("torch")
        assert "\n" not in out.get("error", "")
        return out | {"log": done.stderr}

    return run


OFFLINE = {"HF_HUB_OFFLINE": "1"}
NO_NETWORK = """
def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(forbid)
"""


def test_found_pinned_and_only_what_is_needed(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    out = resolve(MODEL)
    assert (out["id"], out["name"], out["revision"]) == (MODEL, "model", COMMIT)
    assert out["files"][UNET] == hashlib.sha256(files[UNET]).hexdigest()
    assert out["weights"]["unet"].endswith(f"{COMMIT}/{UNET}")
    fetched = {line.split(f"/resolve/{COMMIT}/")[1] for line in hub.requests if "/resolve/" in line}
    assert fetched == out["files"].keys()
    assert out["log"] == ""


def test_second_time_nothing_is_downloaded(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    first = resolve(MODEL)
    hub.requests.clear()
    assert resolve(MODEL) == first
    assert not any("/resolve/" in line for line in hub.requests)


def test_only_fp16_files(hub, files, resolve) -> None:
    full = {name: content for name, content in files.items() if content != b"not wanted"}
    hub.repos[MODEL] = {re.sub(r"\.safetensors$", ".fp16.safetensors", name): content for name, content in full.items()}
    out = resolve(MODEL)
    assert {Path(path).name for path in out["weights"].values()} == {
        "model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    }


def test_revision_is_asked_for(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    assert resolve(MODEL, COMMIT)["revision"] == COMMIT
    assert "has no revision 'v9'" in resolve(MODEL, "v9")["error"]


def test_token_is_sent(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    resolve(MODEL, HF_TOKEN="hf_secret")
    assert hub.tokens == {"Bearer hf_secret"}


def test_not_found(hub, resolve) -> None:
    error = resolve("someone/nothing")["error"]
    assert error.startswith(f"hub model 'someone/nothing' was not found at {hub.url} (401); check the spelling")


def test_gated(hub, resolve) -> None:
    hub.gated.add(MODEL)
    assert f"'{MODEL}' is gated; accept its terms at {hub.url}/{MODEL} and set HF_TOKEN" in resolve(MODEL)["error"]


def test_unsupported_model_is_refused_before_its_weights_are_fetched(hub, files, resolve) -> None:
    index = json.loads(files["model_index.json"]) | {"_class_name": "StableDiffusionXLPipeline"}
    hub.repos[MODEL] = files | {"model_index.json": json.dumps(index).encode()}
    assert "is Stable Diffusion XL" in resolve(MODEL)["error"]
    assert not any(line.endswith(".safetensors") for line in hub.requests)


def test_pickles_only(hub, files, resolve) -> None:
    hub.repos[MODEL] = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    assert (
        "unet/diffusion_pytorch_model.bin is a pickle" in resolve(MODEL)["error"]
        or "no weights" in resolve(MODEL)["error"]
    )
    assert not any(line.endswith(".bin") for line in hub.requests)


def test_single_file_repository(hub, resolve) -> None:
    hub.repos[MODEL] = {"model.safetensors": b""}
    assert (
        "not in diffusers layout (no model_index.json); download its single-file checkpoint" in resolve(MODEL)["error"]
    )


def test_fault_19_retired_id_uses_its_successor(hub, files, resolve) -> None:
    hub.repos[SUCCESSOR] = files
    out = resolve(RETIRED)
    assert (out["id"], out["name"], out["revision"]) == (RETIRED, "stable-diffusion-v1-5", COMMIT)
    assert out["log"] == f"{RETIRED} was removed from the hub; using its successor {SUCCESSOR}\n"


def test_fault_19_retired_id_on_a_mirror_that_kept_it(hub, files, resolve) -> None:
    hub.repos[RETIRED] = files
    out = resolve(RETIRED)
    assert out["revision"] == COMMIT
    assert out["log"] == ""


def test_fault_19_retired_id_in_the_cache_needs_no_network(hub, files, resolve) -> None:
    hub.repos[RETIRED] = files
    first = resolve(RETIRED)
    del hub.repos[RETIRED]
    hub.requests.clear()
    assert resolve(RETIRED, prelude=NO_NETWORK) == first
    assert hub.requests == []


def test_fault_19_retired_id_without_a_successor_says_what_was_tried(hub, resolve) -> None:
    error = resolve(RETIRED)["error"]
    assert error.startswith(f"tried the hub cache, {RETIRED} and its successor")
    assert f"'{SUCCESSOR}' was not found" in error


def test_fault_20_offline_uses_the_cache(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    first = resolve(MODEL)
    assert resolve(MODEL, prelude=NO_NETWORK, **OFFLINE) == first


def test_fault_20_offline_without_the_model(hub, resolve) -> None:
    error = resolve(MODEL, prelude=NO_NETWORK, **OFFLINE)["error"]
    assert "'someone/model' at 'main' is not in the hub cache" in error
    assert "the network is off (HF_HUB_OFFLINE)" in error
    assert f"run `HF_HUB_OFFLINE=0 sd-export --model {MODEL}`" in error


def test_fault_20_offline_with_a_part_missing(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    Path(resolve(MODEL)["weights"]["vae"]).unlink()
    error = resolve(MODEL, prelude=NO_NETWORK, **OFFLINE)["error"]
    assert "has no weights for vae: accepted vae/diffusion_pytorch_model.safetensors" in error
    assert "is not in the hub cache" not in error  # it is, in part
    assert f"run `HF_HUB_OFFLINE=0 sd-export --model {MODEL}`" in error


def test_hub_out_of_reach_uses_the_cache(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    first = resolve(MODEL)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the discard port: nothing listens
    second = resolve(MODEL, **nowhere)
    assert second.pop("log").endswith("; using the copy in the hub cache\n")
    assert second == {key: value for key, value in first.items() if key != "log"}
    assert "cannot be fetched from http://127.0.0.1:9 (" in resolve("someone/else", **nowhere)["error"]


def test_fault_21_download_cut_is_resumed(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    hub.cuts[UNET] = 2
    out = resolve(MODEL)
    assert out["files"][UNET] == hashlib.sha256(files[UNET]).hexdigest()
    assert hub.downloads(UNET) == 3


def test_fault_21_wrong_hash_is_fetched_again(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    hub.corrupt[UNET] = 1
    out = resolve(MODEL)
    assert out["files"][UNET] == hashlib.sha256(files[UNET]).hexdigest()
    assert f"damaged in the hub cache, fetching again: {UNET}" in out["log"]


def test_fault_21_wrong_hash_twice_is_an_error(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    hub.corrupt[UNET] = 2
    error = resolve(MODEL)["error"]
    assert re.search(rf"{UNET} is damaged: got SHA-256 [0-9a-f]{{64}}, accepted [0-9a-f]{{64}}$", error)


def test_fault_21_damaged_cache_offline(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    path = Path(resolve(MODEL)["weights"]["unet"])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    error = resolve(MODEL, prelude=NO_NETWORK, **OFFLINE)["error"]
    assert re.search(rf"{UNET} is damaged: got SHA-256 .*; run `HF_HUB_OFFLINE=0 sd-export --model {MODEL}`", error)
    assert "fetching again" in resolve(MODEL)["log"]


def test_fault_16_disk_full(hub, files, resolve) -> None:
    hub.repos[MODEL] = files
    prelude = """
import errno
import huggingface_hub
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
huggingface_hub.snapshot_download = full
"""
    error = resolve(MODEL, prelude=prelude)["error"]
    assert re.search(r"no space left while downloading 'someone/model' into .*hf/hub \(\d+\.\d GB free\)", error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_cache_that_cannot_be_written(hub, files, resolve, tmp_path) -> None:
    hub.repos[MODEL] = files
    (tmp_path / "hf").mkdir(mode=0o500)
    assert "cannot be written" in resolve(MODEL)["error"]


VAE = "someone/vae"
VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("alone", [True, False])
def test_another_vae_from_the_hub(hub, files, resolve, alone) -> None:
    """Nothing else is fetched of its repository, and the second time nothing at all, with or without a network."""
    hub.repos[MODEL] = files
    hub.repos[VAE] = {name.removeprefix("vae/"): files[name] for name in files if name.startswith("vae/")}
    if not alone:
        hub.repos[VAE] = files
    then = f"c = with_vae(c, {VAE!r})"
    place = "" if alone else "vae/"
    out = resolve(MODEL, then=then)
    assert out["parts"] == {"vae": [VAE, COMMIT, *(place + name for name in VAE_FILES)]}
    asked = {line.split("/resolve/")[1] for line in hub.requests if f"/{VAE}/resolve/" in line}
    assert asked == {f"{COMMIT}/{place}{name}" for name in VAE_FILES}
    assert resolve(MODEL, then=then, prelude=NO_NETWORK, **OFFLINE)["parts"] == out["parts"]


def test_no_tiny_decoder_on_the_hub(hub, files, resolve) -> None:
    hub.repos[MODEL] = hub.repos[VAE] = files
    error = resolve(MODEL, then=f"c = with_taesd(c, {VAE!r})")["error"]
    assert error == f"'{VAE}': got AutoencoderKL, accepted AutoencoderTiny"
    hub.repos["someone/nothing"] = {"README.md": b""}
    error = resolve(MODEL, then="c = with_taesd(c, 'someone/nothing')")["error"]
    assert error == "'someone/nothing' has no AutoencoderTiny: accepted vae/config.json or config.json"


def test_safety_checker_is_fetched_unless_it_is_not_wanted(hub, files, resolve) -> None:
    index = json.loads(files["model_index.json"])
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    checker = {"safety_checker/config.json": b"{}", "feature_extractor/preprocessor_config.json": b"{}"}
    weights = "safety_checker/model.safetensors"
    hub.repos[MODEL] = files | checker | {"model_index.json": json.dumps(index).encode(), weights: files[UNET]}
    assert weights not in resolve(MODEL, safety_checker=False)["files"]
    assert not any(line.endswith(weights) for line in hub.requests)
    assert weights in resolve(MODEL)["files"]
