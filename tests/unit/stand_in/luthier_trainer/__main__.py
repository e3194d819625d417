"""`python -m luthier_trainer VERB --run FILE`: notes how it was called, and ends as `script.json` beside the job's
folder says.

The script maps `VERB-RANK` to {"code", "message", "seconds", "metrics" (text to serve until it was read once),
"until_stopped", "deaf", "dies", "notices"}.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

verb, run = sys.argv[1], json.loads(Path(sys.argv[3]).read_text())
rank = os.environ["LUTHIER_NODE_RANK"]
workspace, folder = Path(run["workspace"]), Path(os.environ["LUTHIER_RUN_DIR"])
script = json.loads((workspace.parent / "script.json").read_text()).get(f"{verb}-{rank}", {})
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())


def serve(text):
    """Serve `text` as this process' metrics. Returns the event that they were read."""
    import http.server  # takes longer to import than everything else here

    read = threading.Event()

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())
            read.set()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "metrics-port").write_text(str(server.server_port))
    return read


with (workspace.parent / "calls.jsonl").open("a") as calls:
    call = {
        "job": run["name"],
        "verb": verb,
        "rank": int(rank),
        "token": os.environ.get("HF_TOKEN"),
        "trackerToken": os.environ.get("MLFLOW_TRACKING_TOKEN"),
        "storeKey": os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "port": run["rendezvousPort"],
    }
    calls.write(json.dumps(call) + "\n")
print(f"{verb} {rank} says hello", flush=True)
if script.get("until_stopped"):
    assert stopped.wait(90)
    script["code"], script["message"] = 75, "saved at step 7"
else:
    if "metrics" in script:
        assert serve(script["metrics"]).wait(90)
    stopped.wait(script.get("seconds", 0))
    time.sleep(script.get("deaf", 0))
if script.get("dies"):
    os.kill(os.getpid(), signal.SIGKILL)
code = script.get("code", 0)
phase = verb if verb in ("prepare", "publish") else "run"
reasons = {
    0: "Completed",
    65: "InvalidDataset",
    70: "TrainingError",
    71: "InfrastructureError",
    75: "Preempted",
    81: "PeerLost",
}
end = {"phase": phase, "code": code, "reason": reasons[code], "message": script.get("message", "")}
if code == 0 and verb == "prepare":
    (workspace / "prepared").mkdir(parents=True, exist_ok=True)
    (workspace / "prepared/prepared.json").write_text("{}")
    end["prepared"] = {
        "model": {"source": "org/model", "revision": "0123456789abcdef"},
        "dataset": {"source": "data.csv", "rows": 90, "evalRows": 10},
        "plan": {
            "strategy": "ddp",
            "worldSize": 2,
            "steps": 12,
            "parameters": 1000,
            "microBatchSize": 4,
            "accumulationSteps": 1,
        },
    }
if code == 0 and verb == "train":
    (workspace / "result").mkdir(exist_ok=True)
    (workspace / "result/MANIFEST.json").write_text('{"files": []}')
    end["metrics"] = {
        "evalLossBefore": 7.5,
        "evalLoss": 2.25,
        "perplexity": 9.49,
        "steps": 12,
        "tokens": 3000,
        "seconds": 5,
    }
if code == 0 and verb == "generate":
    (workspace / "result").mkdir(exist_ok=True)
    (workspace / f"result/shard-{int(rank):05d}-of-00002.jsonl").write_text(
        json.dumps(
            {"row": int(rank), "prompt": "Once", "text": f" upon {rank}{script.get('writes', '')}"}, ensure_ascii=False
        )
        + "\n"
    )
    end["metrics"] = {"rows": 1, "failedRows": script.get("failed", 0), "seconds": 2}
if code == 0 and verb == "publish":
    end["hub"] = {
        "repo": run["spec"]["hub"]["repo"],
        "revision": "fedcba9876543210",
        "url": "https://hub.example/org/model",
    }
if code or "lastLines" in script:
    end["lastLines"] = f"{verb} {rank} says hello"
if "notices" in script:
    end["notices"] = script["notices"]
if os.environ.get("LUTHIER_TERMINATION_LOG"):
    Path(os.environ["LUTHIER_TERMINATION_LOG"]).write_text(json.dumps(end))
sys.exit(code)
