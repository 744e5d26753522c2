"""Answers that cannot be right are refused, and secrets in URLs and headers stay unseen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drift_fast.checkpoints.remote import RemoteCheckpoint, open_url, sparse
from drift_fast.errors import CheckpointError
from support.range_server import Fault, RangeServer
from support.remote import (
    CHANGED,
    FILE,
    SINGLE,
    START_NBYTES,
    assert_unseen,
    check_held,
    has,
    held,
    shard_of,
)
from support.synthetic import refused


def without(text: str) -> dict[str, str | None]:
    return {text: None}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(headers={"Content-Range": "bytes 0-999/5000150"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000001-1000999/9999999"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000000-1001000/9999999"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000000-999998/9999999"}), ["Content-Range"]),
        (
            Fault(headers={"Content-Range": "bytes 1000000-999999/9999999"}, body=b""),
            ["Content-Range"],
        ),
        (
            Fault(
                headers={"Content-Range": f"bytes 1000000-1001000/{len(FILE)}"},
                body=FILE[1_000_000:1_001_001],
            ),
            ["Content-Range"],
        ),
        (Fault(headers={"Content-Range": "bytes 1000000-1000999/*"}), ["Content-Range"]),
        (Fault(headers={"Content-Range": "garbage"}), ["Content-Range", "garbage"]),
        (Fault(headers=without("Content-Range")), ["Content-Range"]),
        (Fault(headers={"Content-Range": "bytes 1000000-1000999/9999999"}), ["changed"]),
        (Fault(body=FILE[1_000_000:1_001_001]), ["Content-Length 1001"]),
        (Fault(body=FILE[1_000_000:1_000_999]), ["Content-Length 999"]),
        (
            Fault(
                body=FILE[1_000_000:1_001_001],
                headers={"Content-Length": None, "Connection": "close"},
            ),
            ["longer than its range"],
        ),
        (Fault(headers={"Content-Type": "Text/HTML"}), ["web page"]),
        (Fault(headers={"Content-Encoding": "gzip"}), ["gzip"]),
        (Fault(status=416), ["416"]),
        (Fault(status=204), ["204"]),
        (Fault(status=304), ["304"]),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(
    opened: RemoteCheckpoint,
    server: RangeServer,
    waits: list[float],
    fault: Fault,
    words: list[str],
) -> None:
    server.faults.append(fault)
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", *words):
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert len(server.requests) == 1
    assert not waits
    check_held(opened.directory, {SINGLE: FILE})


def test_a_server_may_send_less_than_it_was_asked_for(
    opened: RemoteCheckpoint, server: RangeServer, waits: list[float]
) -> None:
    total = len(FILE)
    server.faults.append(
        Fault(
            body=FILE[1_000_000:1_000_400],
            headers={"Content-Range": f"bytes 1000000-1000399/{total}"},
        )
    )
    assert opened.fetch({SINGLE: [(1_000_000, 1_001_000)]}).fetched_nbytes == 1000
    assert [request.nbytes for request in server.requests] == [400, 600]
    assert not waits
    check_held(opened.directory, {SINGLE: FILE})


def test_a_file_shorter_than_its_first_answer_said_is_refused(
    opened: RemoteCheckpoint, server: RangeServer
) -> None:
    server.files[f"/m/{SINGLE}"] = FILE[:500_000]
    with refused(CheckpointError, "416", "has changed"):
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    with refused(CheckpointError, "changed", 500_000):
        opened.fetch({SINGLE: [(400_000, 1_001_000)]})


def change_etag(server: RangeServer) -> None:
    server.files[f"/m/{SINGLE}"] = CHANGED


def drop_etag(server: RangeServer) -> None:
    server.etags = False


def change_time(server: RangeServer) -> None:
    server.last_modified = "Tue, 02 Jan 2029 00:00:00 GMT"


def change_length(server: RangeServer) -> None:
    server.files[f"/m/{SINGLE}"] = FILE + b"1"


@pytest.mark.parametrize(
    ("etags", "change"),
    [(True, change_etag), (True, drop_etag), (False, change_time), (False, change_length)],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_in_the_middle_is_an_error_and_opening_again_reads_it_afresh(
    server: RangeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    etags: bool,
    change: Callable[[RangeServer], None],
    ranges: bool,
) -> None:
    monkeypatch.setattr(sparse, "PART_NBYTES", 100_000)
    server.etags, server.ranges = etags, ranges
    server.last_modified = "Mon, 01 Jan 2029 00:00:00 GMT"
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})
    check_held(opened.directory, {SINGLE: FILE})
    change(server)
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "the file changed on the server"):
        opened.fetch({SINGLE: [(2_000_000, 3_000_000)]})
    check_held(opened.directory, {SINGLE: FILE})
    now = server.files[f"/m/{SINGLE}"]
    assert isinstance(now, bytes)
    afresh = open_url(f"{server.url}/m", cache=tmp_path)
    assert afresh.directory == opened.directory
    assert held(afresh.directory) == [(0, START_NBYTES)]
    afresh.fetch({SINGLE: [(2_000_000, 3_000_000)]})
    check_held(afresh.directory, {SINGLE: now})
    with refused(CheckpointError, "open the checkpoint again"):
        opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})


def test_a_change_between_two_requests_of_one_fetch_is_seen(
    opened: RemoteCheckpoint, server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "PART_NBYTES", 100_000)
    server.change = (5, lambda: change_etag(server))
    with refused(CheckpointError, "the file changed on the server"):
        opened.fetch({SINGLE: [(1_000_000, 4_000_000)]})
    check_held(opened.directory, {SINGLE: FILE})


def test_without_etag_and_time_the_first_bytes_tell_another_file_of_that_length(
    server: RangeServer, tmp_path: Path
) -> None:
    server.etags = False
    opened = open_url(f"{server.url}/m", cache=tmp_path)
    assert opened.etags == {SINGLE: None}
    opened.fetch({SINGLE: [(1_000_000, 1_500_000)]})
    open_url(f"{server.url}/m", cache=tmp_path)
    assert has(opened.directory, 1_000_000, 1_500_000)
    server.files[f"/m/{SINGLE}"] = shard_of(8, header_nbytes=1000, a=len(FILE) - 1008)
    open_url(f"{server.url}/m", cache=tmp_path)
    assert held(opened.directory) == [(0, START_NBYTES)]


# ------------------------------------------------------------------ redirects and secrets


def test_a_redirect_is_followed_and_remembered_until_its_signature_expires(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer, waits: list[float]
) -> None:
    server.redirects[f"/m/{SINGLE}"] = lambda request: f"{cdn.url}/blob?sig=n{len(server.requests)}"
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})
    assert [request.target for request in cdn.requests] == ["/blob?sig=n1"] * 2
    cdn.faults.append(Fault(status=403))
    opened.fetch({SINGLE: [(3_000_000, 3_001_000)]})
    assert [request.target for request in cdn.requests][2:] == ["/blob?sig=n1", "/blob?sig=n2"]
    assert not waits
    check_held(opened.directory, {SINGLE: FILE})
    cdn.always = Fault(status=403)
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "403"):
        opened.fetch({SINGLE: [(4_000_000, 4_001_000)]})
    assert len(server.requests) == 3


def test_after_trouble_at_the_other_end_of_a_redirect_the_url_itself_is_asked(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer
) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob"
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    for fault in [Fault(status=503), Fault(silent=True)]:
        cdn.faults.append(fault)
        server.requests.clear()
        start = 2_000_000 if fault.silent else 3_000_000
        opened.fetch({SINGLE: [(start, start + 1000)]})
        assert len(server.requests) == 1
    check_held(opened.directory, {SINGLE: FILE})


def test_a_redirect_loop_ends(opened: RemoteCheckpoint, server: RangeServer) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"/m/{SINGLE}"
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "more than 10 redirects"):
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert len(server.requests) == 11


@pytest.mark.parametrize(
    "place",
    ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://u:hush@127.0.0.1/x", "", "http://["],
)
def test_a_redirect_to_what_is_no_plain_http_url_is_refused(
    opened: RemoteCheckpoint, server: RangeServer, place: str
) -> None:
    server.redirects[f"/m/{SINGLE}"] = place
    with refused(CheckpointError, f"{server.url}/m/{SINGLE}", "redirects") as caught:
        opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert caught is None
    assert len(server.requests) == 1


def test_a_redirect_out_of_encryption_is_refused(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests
    from urllib3.response import HTTPResponse

    sent: list[str | None] = []

    def send(adapter: object, request: requests.PreparedRequest, **options: object) -> Any:
        sent.append(request.url)
        headers = {"Location": f"{server.url}/m/{SINGLE}?sig=hush"}
        raw = HTTPResponse(b"", headers=headers, status=302, preload_content=False)
        return requests.adapters.HTTPAdapter().build_response(request, raw)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with refused(CheckpointError, "from https to", "not encrypted"):
        open_url("https://model.invalid/model.safetensors", cache=tmp_path)
    assert sent == ["https://model.invalid/model.safetensors"]
    assert not server.requests


def test_a_cookie_does_not_go_to_another_port_of_its_host(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer
) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob"
    server.always = Fault(headers={"Set-Cookie": "session=hush; Path=/"})
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert "cookie" not in cdn.requests[0].headers


def test_the_body_of_a_redirect_is_not_read(
    opened: RemoteCheckpoint, server: RangeServer, cdn: RangeServer
) -> None:
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob"
    server.faults.append(Fault(body=b"x" * 50_000_000))
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert server.nbytes < 50_000_000


def test_a_signature_is_in_no_message_no_log_and_no_file(
    opened: RemoteCheckpoint,
    server: RangeServer,
    cdn: RangeServer,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.redirects[f"/m/{SINGLE}"] = f"{cdn.url}/blob?sig=hush"
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    assert "sig=hush" in cdn.requests[0].target
    faults = [Fault(silent=True), Fault(status=500), Fault(drop_after=0), Fault(status=404)]
    for fault in [*faults, Fault(headers={"Content-Range": "x"}), Fault(body=b"")]:
        cdn.always = fault
        with pytest.raises((CheckpointError, FileNotFoundError)) as caught:
            opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})
        chain: BaseException | None = caught.value
        while chain is not None:
            assert "hush" not in f"{chain} {chain!r}"
            chain = chain.__cause__ or chain.__context__
    with RangeServer({}) as gone:
        server.redirects[f"/m/{SINGLE}"] = f"{gone.url}/blob?sig=hush"
    # The second attempt is sent there.
    cdn.always = Fault(silent=True)
    with pytest.raises(CheckpointError, match="refused") as refusal:
        opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})
    assert "hush" not in str(refusal.value)
    assert "/blob" in caplog.text
    assert_unseen("hush", tmp_path, caplog.text)


def test_a_user_or_password_in_a_url_is_refused_and_not_repeated(
    server: RangeServer, tmp_path: Path
) -> None:
    url = server.url.replace("//", "//me:hush@") + f"/m/{SINGLE}"
    with pytest.raises(CheckpointError, match="user or password") as caught:
        open_url(url, cache=tmp_path)
    assert "hush" not in str(caught.value)
    assert not server.requests


def test_a_plain_url_gets_no_token_password_or_cookie(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hush\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_hush")
    server.always = Fault(headers={"Set-Cookie": "session=1; Path=/"})
    opened = open_url(f"{server.url}/m", cache=tmp_path / "cache")
    opened.fetch({SINGLE: [(1_000_000, 1_001_000)]})
    opened.optional_file("config.json")
    assert len(server.requests) == 4
    for request in server.requests:
        assert not {"authorization", "cookie"} & set(request.headers)
        assert request.headers["accept-encoding"] == "identity"
    server.authorization = "Bearer hf_hush"
    with refused(CheckpointError, "401"):
        opened.fetch({SINGLE: [(2_000_000, 2_001_000)]})


def test_a_proxy_of_the_environment_is_used(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.files[f"http://model.invalid/m/{SINGLE}"] = FILE
    opened = open_url("http://model.invalid/m", cache=tmp_path)
    check_held(opened.directory, {SINGLE: FILE})


def test_a_server_whose_certificate_is_not_trusted_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    import ssl

    import requests

    def send(*given: object, **options: object) -> Any:
        raise requests.exceptions.SSLError("?sig=hush") from ssl.SSLCertVerificationError("self")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with refused(CheckpointError, "https://model.invalid", "certificate", "REQUESTS_CA_BUNDLE"):
        open_url("https://model.invalid/model.safetensors", cache=tmp_path)
    assert not waits
