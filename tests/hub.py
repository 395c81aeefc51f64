"""A local server that answers like Hugging Face's hub for one small data set, and fails on demand: the real client is
tested against it."""

import hashlib
import http.server
import json
import re
import sys
import threading
import time
import urllib.parse
from contextlib import redirect_stderr, redirect_stdout

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = "HuggingFaceFW/fineweb-edu"
SHA = "0123456789abcdef0123456789abcdef01234567"
README = """---
configs:
- {config_name: default, data_files: [{split: train, path: data/*/*}]}
- {config_name: sample-10BT, data_files: [{split: train, path: sample/10BT/*}]}
---
"""


def write_dataset(folder, documents, files=3, row_group=50):
    """Write the files of the repository: the documents in `files` parquet files, of several row groups each."""
    (folder / "sample" / "10BT").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    (folder / "data" / "CC-MAIN-2013-20").mkdir(parents=True)
    share = -(-len(documents) // files)
    contents = {f"sample/10BT/{n:03}_00000": documents[n * share : (n + 1) * share] for n in range(files)}
    contents["data/CC-MAIN-2013-20/train-00000-of-00001"] = ["not of the sample"]
    for name, texts in contents.items():
        table = pa.table({"text": texts, "id": [str(k) for k in range(len(texts))], "score": [1.0] * len(texts)})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=row_group)


def prepare_quickly(arguments, log, constants):
    """Run prepare_data.py in a process of its own, with small batches, and with short waits instead of those that a
    real network needs. What it prints goes to the file `log`; `constants` are the client's."""
    import huggingface_hub

    import prepare_data
    from plumbing import sources

    sleep, sources.PIECE = time.sleep, 5_000
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    for name, value in constants.items():
        setattr(huggingface_hub.constants, name, value)
    with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(prepare_data.main(arguments))


class Hub(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults` is a list of (pattern of "METHOD /path", what happens, how many times); what happens
    to a matching request is a status, "drop" (no answer) or "cut" (half of the answer)."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self):
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "NO_PROXY": "127.0.0.1"}
        return endpoint | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def name_of(self, path):
        return path.relative_to(self.folder).as_posix()

    def fault(self, request):
        for number, (pattern, what, times) in enumerate(self.faults):
            if times and re.search(pattern, request):
                self.faults[number] = (pattern, what, times - 1)
                return what
        return None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", cut=False, **headers):
        self.send_response(status)
        headers = {"Content-Length": len(body), "X-Repo-Commit": SHA} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def do_GET(self):
        request = f"{self.command} {self.path}"
        self.server.requests.append(request)
        fault = self.server.fault(request)
        if fault == "drop":
            self.close_connection = True
        elif isinstance(fault, int):
            self.answer(fault, b"{}", X_Error_Message="the server is ill")
        else:
            self.serve(cut=fault == "cut")

    do_HEAD = do_GET

    def serve(self, cut):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
            files = [self.server.name_of(path) for path in self.server.folder.rglob("*") if path.is_file()]
            about = {"id": REPOSITORY, "sha": SHA, "private": False, "gated": False, "disabled": False, "tags": []}
            self.answer(200, json.dumps(about | {"siblings": [{"rfilename": name} for name in files]}).encode())
        elif path.startswith(f"{api}/tree/{SHA}"):
            self.tree(path.removeprefix(f"{api}/tree/{SHA}").strip("/"))
        elif path.startswith(resolve):
            self.file(path.removeprefix(resolve).partition("/")[2], cut)
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    def tree(self, name):
        folder = self.server.folder / name
        if not folder.is_dir():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        entries = []
        for path in sorted(folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()):
            kind = "file" if path.is_file() else "directory"
            about = {"type": kind, "size": path.stat().st_size, "oid": "0" * 40, "path": self.server.name_of(path)}
            entries.append(about)
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def file(self, name, cut):
        path = self.server.folder / name
        if not path.is_file():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        body = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, body, cut, **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
        self.answer(206, body[first : last + 1], cut, Content_Range=f"bytes {first}-{last}/{len(body)}", **headers)
