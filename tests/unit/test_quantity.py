"""Quantities as the API server would write them."""

from __future__ import annotations

import pytest

from luthier_api.quantity import canonical, cores

CANONICAL = [
    ("1", "1"),
    ("0", "0"),
    ("0.1", "100m"),
    ("0.5", "500m"),
    ("1.5", "1500m"),
    ("1000m", "1"),
    ("1500m", "1500m"),
    ("2000m", "2"),
    ("1000", "1k"),
    ("1024Mi", "1Gi"),
    ("512Mi", "512Mi"),
    ("1.5Gi", "1536Mi"),
    ("0.5Gi", "512Mi"),
    ("524288Mi", "512Gi"),
    ("1024Pi", "1Ei"),
    ("1024", "1024"),
    ("1000Mi", "1000Mi"),
    ("1000M", "1G"),
    ("1.5G", "1500M"),
    ("0.0001", "1m"),
    ("0.1Ki", "103"),
    ("0.9999", "1"),
    ("1e3", "1k"),
    ("1e+09", "1G"),
    ("12E-1", "1200m"),
    ("+.5Gi", "512Mi"),
    ("1E", "1E"),
]


@pytest.mark.parametrize(("written", "expect"), CANONICAL)
def test_canonical(written: str, expect: str) -> None:
    assert canonical(written) == expect
    assert canonical(expect) == expect


@pytest.mark.parametrize(("written", "expect"), [("500m", 1), ("1", 1), ("3500m", 3), ("64", 64), ("0.5", 1)])
def test_cores(written: str, expect: int) -> None:
    assert cores(written) == expect
