"""A Hub for the tests: what `huggingface_hub` 2.4 and `datasets` call to read and publish models and datasets.

In a test it runs in a thread (`server.Running`), in a cluster as a pod (`manifests`), by hand as `python -m hub --root
DIR`. Uploads take the LFS path: clients set HF_HUB_DISABLE_XET=1. Files in the order of a request: `server` (routes),
`faults`, `access` (who may do what, and how the Hub says no), `store` (commits, trees and blobs in a folder).
"""
