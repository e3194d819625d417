"""Failures of pods: how one pod ended (`pod_end`), which of several ends is the cause (`cause`), and what the status
keeps of them (`attempts`).
"""
