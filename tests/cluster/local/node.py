"""The node: a bridge for the pods, containerd, the kubelet, kube-proxy and CoreDNS, and eight GPUs that are only
counted.
"""

import json
import socket
import struct
import subprocess

from .images import load, scratch_image
from .progress import say
from .shell import BIN, NODE, NODE_IP, REGISTRY, STATE, ctr, fetch, kubectl, sh, start, write

BRIDGE, POD_NET = "kbr0", "10.244.0.0/24"
PAUSE = "local/pause:1"
FAKE_GPUS = 8
API_SERVICE, API_SERVICE_IP = "kubernetes.default.svc.cluster.local", "10.96.0.1"


def network() -> None:
    """Errors are ignored: the bridge may be there already."""
    commands = [
        f"ip link add {BRIDGE} type bridge",
        f"ip addr add {NODE_IP}/24 dev {BRIDGE}",
        f"ip link set {BRIDGE} up",
        "sysctl -qw net.ipv4.ip_forward=1",
        "iptables -P FORWARD ACCEPT",
    ]
    for command in commands:
        subprocess.run(command.split(), stderr=subprocess.DEVNULL)
    addresses = {
        "type": "host-local",
        "dataDir": str(STATE / "ipam"),
        "routes": [{"dst": "0.0.0.0/0"}],
        "ranges": [[{"subnet": POD_NET, "rangeStart": "10.244.0.10"}]],
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True, "ipam": addresses}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    write("cni/10-bridge.conflist", json.dumps({"cniVersion": "0.4.0", "name": "bridge", "plugins": [bridge, ports]}))


def containerd() -> None:
    write(f"certs.d/{REGISTRY}/hosts.toml", f'[host."http://{REGISTRY}"]\n  capabilities = ["pull", "resolve"]\n')
    write("resolv.conf", "")
    start("containerd", "containerd", "--config", write("containerd.toml", CONTAINERD.format(state=STATE, pause=PAUSE)))


def containerd_answers() -> bool:
    return bool(ctr("version", stderr=subprocess.DEVNULL))


def kubelet() -> None:
    pause_image()
    start(
        "kubelet",
        BIN / "kubelet",
        f"--config={write('kubelet.yaml', KUBELET.format(state=STATE, dns=NODE_IP))}",
        f"--kubeconfig={STATE}/kubelet.kubeconfig",
        f"--hostname-override={NODE}",
        f"--node-ip={NODE_IP}",
        f"--root-dir={STATE}/kubelet",
    )


def node_is_ready() -> bool:
    """By the kubelet itself, too: the API server calls a node ready for some time after its kubelet has gone.

    A node that is short of disk or memory is ready, but evicts every pod. A kubelet that starts again looks anew.
    """
    if fetch("http://127.0.0.1:10248/healthz") != 200:
        return False
    holds = node("jsonpath={.status.conditions[?(@.status=='True')].type}").split()
    short = [condition for condition in holds if condition.endswith("Pressure")]
    if short:
        say(f"node {NODE}: {', '.join(short)}: the kubelet evicts pods; `buildah rm --all` frees layers of images")
    return "Ready" in holds and not short


def node(path: str) -> str:
    return kubectl("get", "node", NODE, "-o", path, "--request-timeout=5s", stderr=subprocess.DEVNULL)


def gpus() -> None:
    """A kubelet that starts again forgets them."""
    capacity = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": str(FAKE_GPUS)}]
    kubectl("patch", "node", NODE, "--subresource=status", "--type=json", "-p", json.dumps(capacity))


def gpus_are_counted() -> bool:
    return node("jsonpath={.status.allocatable.nvidia\\.com/gpu}") == str(FAKE_GPUS)


def kube_proxy() -> None:
    config = write("kube-proxy.yaml", KUBE_PROXY.format(state=STATE, node=NODE, net=POD_NET))
    start("kube-proxy", BIN / "kube-proxy", "--config", config)


def kube_proxy_answers() -> bool:
    return fetch("http://127.0.0.1:10256/healthz") == 200


def coredns() -> None:
    kubectl("apply", "-f", write("coredns.yaml", COREDNS_RBAC))
    start("coredns", BIN / "coredns", "-conf", write("Corefile", COREFILE.format(state=STATE, dns=NODE_IP)))


def coredns_answers() -> bool:
    """Whether it knows the address of the API server's Service."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in API_SERVICE.split("."))
    one_question = struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0)  # id, recursion desired, then the numbers of records
    address_of = struct.pack("!2H", 1, 1)  # A, IN
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.settimeout(2)
        asked.sendto(one_question + labels + b"\0" + address_of, (NODE_IP, 53))
        return asked.recv(512).endswith(socket.inet_aton(API_SERVICE_IP))


def pause_image() -> None:
    """What holds a pod's namespaces: compiled here, as its registry may be out of reach."""
    source = write("pause.c", "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n")
    program = STATE / "pause"
    sh("gcc", "-Os", "-static", "-o", program, source)
    load(scratch_image(PAUSE, program, "/pause"))


CONTAINERD = """
    version = 2
    root = "{state}/containerd"
    state = "{state}/containerd-run"
    [grpc]
      address = "{state}/containerd.sock"
    [plugins."io.containerd.grpc.v1.cri"]
      sandbox_image = "docker.io/{pause}"
      restrict_oom_score_adj = true   # needed where the host lacks CAP_SYS_RESOURCE
      enable_unprivileged_ports = true
      [plugins."io.containerd.grpc.v1.cri".cni]
        bin_dir = "/usr/lib/cni"
        conf_dir = "{state}/cni"
      [plugins."io.containerd.grpc.v1.cri".registry]
        config_path = "{state}/certs.d"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
        runtime_type = "io.containerd.runc.v2"
"""
KUBELET = """
    apiVersion: kubelet.config.k8s.io/v1beta1
    kind: KubeletConfiguration
    containerRuntimeEndpoint: unix://{state}/containerd.sock
    cgroupDriver: cgroupfs
    failCgroupV1: false
    enforceNodeAllocatable: []
    failSwapOn: false
    oomScoreAdj: 0
    maxOpenFiles: 20000
    authentication:
      anonymous: {{enabled: false}}
      webhook: {{enabled: true}}
      x509: {{clientCAFile: {state}/pki/client-ca.crt}}
    authorization: {{mode: Webhook}}
    clusterDNS: [{dns}]
    clusterDomain: cluster.local
    resolvConf: {state}/resolv.conf
    imageGCHighThresholdPercent: 100
    imageGCLowThresholdPercent: 99
    evictionHard: {{memory.available: 50Mi, nodefs.available: "1%", imagefs.available: "1%"}}
    serializeImagePulls: false
"""
KUBE_PROXY = """
    apiVersion: kubeproxy.config.k8s.io/v1alpha1
    kind: KubeProxyConfiguration
    mode: iptables
    hostnameOverride: {node}
    clusterCIDR: {net}
    oomScoreAdj: 0
    clientConnection: {{kubeconfig: {state}/kube-proxy.kubeconfig}}
    conntrack: {{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
"""
COREFILE = """
    .:53 {{
      bind {dns}
      kubernetes cluster.local in-addr.arpa {{
        kubeconfig {state}/coredns.kubeconfig
      }}
      errors
      cache 2
    }}
"""
COREDNS_RBAC = """
    apiVersion: rbac.authorization.k8s.io/v1
    kind: ClusterRole
    metadata: {name: coredns}
    rules:
    - {apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}
    - {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
    ---
    apiVersion: rbac.authorization.k8s.io/v1
    kind: ClusterRoleBinding
    metadata: {name: coredns}
    roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: coredns}
    subjects: [{kind: User, name: coredns, apiGroup: rbac.authorization.k8s.io}]
"""
