"""`python -m hub --port 8080 --root DIR [--seed TYPE/NAMESPACE/NAME=FOLDER ...]`"""

import argparse
from pathlib import Path

from aiohttp import web

from .server import application
from .store import Store


def main() -> None:
    parser = argparse.ArgumentParser(prog="hub", description="A Hub for the tests.")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories; kept")
    parser.add_argument(
        "--seed",
        action="append",
        default=[],
        metavar="TYPE/NAMESPACE/NAME=FOLDER",
        help="a repository with a folder's files",
    )
    options = parser.parse_args()
    store = Store(options.root)
    for seed in options.seed:
        repository, folder = seed.split("=", 1)
        kind, name = repository.split("/", 1)
        store.seed(kind, name, Path(folder))
    web.run_app(application(store), host=options.host, port=options.port, print=None)


if __name__ == "__main__":
    main()
