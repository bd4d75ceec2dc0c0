from __future__ import annotations

import pytest

from cascade.addresses import parse_addresses


def test_one_address_or_several() -> None:
    assert parse_addresses("127.0.0.1:8001") == [("127.0.0.1", 8001)]
    assert parse_addresses("a:1, triton.cascade.svc.cluster.local.:8001,[fd00::1]:65535") == [
        ("a", 1),
        ("triton.cascade.svc.cluster.local.", 8001),
        ("fd00::1", 65_535),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("", "triton", ":8001", "triton:", "triton:0", "triton:65536", "triton:-1", "triton:8x", "triton:٣", "a:1,"),
        *("a:1 b:2", "http://triton:8001", "dns:///triton:8001", "::1:8001", "tri\nton:8001"),
    ],
)
def test_what_is_not_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        parse_addresses(text)
