"""A store of each kind, and little patience."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import fsspec
import pytest
from remote.servers import S3Server, s3_server

from noisyclean.corpus import remote

SECRET = "Zq7-sEcReT-42"  # in every credential of these tests; nothing that is written or said may hold it


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, short pauses."""
    monkeypatch.setattr(remote, "BLOCK", 2**18)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "STALL", 0.2)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A store that libraries take for Amazon's, with the bucket ``corpus``."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, s3_server() as server:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("corpus")
        yield server
