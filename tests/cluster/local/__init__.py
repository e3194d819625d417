"""A real one-node Kubernetes without Docker, for machines where kind cannot run.

Real parts: a registry, etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, CoreDNS,
containerd and runc (Debian packages), and the JobSet controller installed by its own Helm chart. Invented: eight GPUs
on the node, which the scheduler counts and nobody can use. Files in the order of a start: `components`, `certificates`,
`control_plane`, `node`, `volumes`; `images` builds and pushes.
"""
