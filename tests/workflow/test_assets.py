"""``snakemake weights`` fetches what the metrics of the configuration read, and nothing else asks for it."""

import hashlib
import http.server
import threading
from functools import partial

import yaml

from tests.workflow import tiny


def test_weights_are_fetched_when_they_are_asked_for(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    (served / "trunk.pth").write_bytes(b"weights")
    project = tiny.make(tmp_path / "project")
    chosen = ["licenses=permissive", "metrics=[ewarp_dis, dists, lpips]"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        listed = project / "config" / "assets.yaml"
        table = yaml.safe_load(listed.read_text())
        table["alexnet"] |= {
            "file": "trunk.pth",
            "urls": [f"http://127.0.0.1:{server.server_port}/trunk.pth"],
            "sha256": hashlib.sha256(b"weights").hexdigest(),
            "bytes": None,
        }
        listed.write_text(yaml.safe_dump(table))
        done = tiny.snakemake(project, "weights", "--config", *chosen)
        server.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.name for file in (project / "resources" / "assets").iterdir()] == ["trunk.pth"]  # that of lpips alone
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("licenses: permissive leaves out")]
    assert said == ["licenses: permissive leaves out dists (PolyForm-Noncommercial-1.0.0)"]
    assert "weights" not in tiny.due(project, "--config", *chosen)
