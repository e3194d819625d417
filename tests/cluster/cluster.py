#!/usr/bin/env python3
"""A Kubernetes for the tests, on one Linux machine.

    cluster.py ensure             a running cluster, built and started if need be; prints `export` lines for a shell
    cluster.py install-packages   the Debian packages that the local cluster needs (apt-get, as root)
    cluster.py build              compile the components from Go modules (half an hour on two cores, then cached)
    cluster.py up | down          start it; stop it and remove its state (binaries and images stay)
    cluster.py image CONTEXT TARGET NAME   build a Dockerfile target where the cluster finds it; print its reference
    cluster.py image-size NAME    compressed bytes of each layer of a pushed image, as JSON
    cluster.py recycle            wipe released volumes and offer them again

Which cluster: KUBECONFIG set, the one it names, as it is (images by LUTHIER_OPERATOR_IMAGE and LUTHIER_TRAINER_IMAGE;
the tests do not start where Luthier is installed, unless LUTHIER_TESTS_MAY_DELETE=yes); CLUSTER=kind, a kind cluster,
which is also taken where kind and Docker are there, because all of it is built already; CLUSTER=local, the one of
`local/`, which needs root and Go but neither Docker nor nested containers, and compiles for half an hour once.
WHEELS names a folder of wheels for the image build, such as torch's CPU build (with kind: a URL).
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

# Run as a script, this folder is on the path and its parent is not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster import choice


def main(arguments: list[str]) -> None:
    cluster = choice.cluster()
    verbs: dict[str, Callable[..., object]] = {
        "ensure": cluster.ensure,
        "install-packages": cluster.install_packages,
        "build": cluster.build,
        "up": cluster.up,
        "down": cluster.down,
        "image": cluster.image,
        "image-size": cluster.image_size,
        "recycle": cluster.recycle,
    }
    if not arguments or arguments[0] not in verbs:
        raise SystemExit(__doc__)
    answer = verbs[arguments[0]](*arguments[1:])
    if isinstance(answer, dict):
        answer = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in answer.items())
    if answer is not None:
        print(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
