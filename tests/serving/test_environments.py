"""Proxies, certificates and keys that keep a client from its server: each is named, and the advice works."""

import re
import shutil
import ssl
import subprocess
import sys
from contextlib import contextmanager

import pytest

import falcon_kit as fk
from tests.serving import servers
from tests.serving.servers import DONE, Reply, answering, as_reply, free_port, scripted

PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def certificate(folder, name):
    """A self-signed certificate for a name ("IP:127.0.0.1"), with its key in one file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    made = folder / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -out {0} -keyout {0}.key -addext {1}"
    subprocess.run(command.format(made, f"subjectAltName={name}").split(), check=True, capture_output=True)
    return made


@contextmanager
def with_tls(file):
    """A scripted server that speaks TLS, and the number of connections that it got."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, f"{file}.key")
    calls = []

    class Server(servers.HTTPServer):
        def get_request(self):
            connection, client = super().get_request()
            calls.append(client)
            return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), client

        def handle_error(self, *_):
            """Shows nothing."""

    with scripted(answering(Reply(DONE)), Server) as server:
        yield f"{server.address.replace('http', 'https')}/v1", calls


def test_a_self_signed_certificate_is_named_not_tried_again_and_works_as_advised(tmp_path, monkeypatch):
    made = certificate(tmp_path, "IP:127.0.0.1")
    with with_tls(made) as (address, calls):
        with pytest.raises(ConnectionError, match=r"the certificate of .* is refused \(self.signed.*SSL_CERT_FILE"):
            fk.connect(address)
        assert len(calls) == 1
        monkeypatch.setenv("SSL_CERT_FILE", str(made))
        assert fk.connect(address).generate("Hi").text == "Hello there"


def test_a_certificate_for_another_host_is_named(tmp_path, monkeypatch):
    made = certificate(tmp_path, "DNS:elsewhere")
    monkeypatch.setenv("SSL_CERT_FILE", str(made))
    with with_tls(made) as (address, calls):
        with pytest.raises(ConnectionError, match=r"mismatch.*connect to a host name that the certificate contains"):
            fk.connect(address)
        assert len(calls) == 1


def test_a_server_with_tls_is_named_to_a_client_without(tmp_path, monkeypatch):
    made = certificate(tmp_path, "IP:127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(made))
    with with_tls(made) as (address, _):
        with pytest.raises(ConnectionError, match="or connect to https://") as error:
            fk.connect(address.replace("https", "http"), retries=0)
        advised = re.search(r"https://\S+", str(error.value))[0]
        assert fk.connect(advised).generate("Hi").text == "Hello there"


def test_a_server_without_tls_is_named_once_and_works_as_advised():
    with scripted(answering(Reply(DONE))) as server:
        with pytest.raises(ConnectionError, match="does not answer in TLS: connect to http://") as error:
            fk.connect(server.address.replace("http", "https") + "/v1")
        advised = re.search(r"connect to (http://\S+)", str(error.value))[1]
        assert fk.connect(advised).generate("Hi").text == "Hello there"


DEAD = f"127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("ALL_PROXY", f"socks5://{DEAD}", ModuleNotFoundError, "ALL_PROXY names a SOCKS proxy.*pip install socksio"),
        ("all_proxy", f"socks5h://{DEAD}", ModuleNotFoundError, "all_proxy names a SOCKS proxy"),
        ("ALL_PROXY", f"socks://{DEAD}", ValueError, "ALL_PROXY names no proxy that can be used.*socks5://"),
        ("HTTP_PROXY", "http://me:hunter2@host:port", ValueError, "HTTP_PROXY names no proxy"),
        ("HTTP_PROXY", f"http://me:hunter2@{DEAD}", ConnectionError, rf"the proxy http://\*\*\*@{DEAD} .*not answer"),
        ("HTTP_PROXY", DEAD, ConnectionError, "the proxy .* does not answer: start it, or set NO_PROXY=127"),
        ("SSL_CERT_FILE", "/nowhere/x.pem", ValueError, "SSL_CERT_FILE or SSL_CERT_DIR names no certificates"),
    ],
    ids=["socks5", "socks5h", "socks", "no port", "with a password", "dead", "no certificates"],
)
def test_a_setting_of_the_environment_that_fails_is_named_and_the_advice_works(monkeypatch, name, value, error, match):
    monkeypatch.setenv(name, value)
    with scripted(answering(Reply(DONE))) as server:
        if "socks5" in value:
            monkeypatch.setitem(sys.modules, "socksio", None)
        with pytest.raises(error, match=match) as refused:
            fk.connect(f"{server.address}/v1", retries=1)
        assert "hunter2" not in str(refused.value)
        advised = re.search(r"NO_PROXY=(\S+)", str(refused.value))
        if advised:
            monkeypatch.setenv("NO_PROXY", advised[1])
        else:
            monkeypatch.delenv(name)
        assert fk.connect(f"{server.address}/v1").generate("Hi").text == "Hello there"


def test_a_proxy_that_refuses_to_connect_is_named(monkeypatch):
    def refusing(*_):
        return as_reply({}, 403)

    monkeypatch.setattr(servers._Handler, "do_CONNECT", servers._Handler.do_POST, raising=False)
    with scripted(refusing) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.address)
        with pytest.raises(ConnectionError, match=r"the proxy http://.* does not connect to .*403.*NO_PROXY=localhost"):
            fk.connect(f"https://localhost:{free_port()}/v1")
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("sk-0123456789\n", r"begins or ends with a space or a line end: pass it without, as token=key.strip\(\)"),
        ("\ufeffsk-0123456789", "character 0 of the key"),
        ("sk-0123456789\r\n", "begins or ends with"),
        (" sk-0123456789", "begins or ends with"),
        ("sk-0123\n456789", "character 7 of the key"),
        ("sk-schlüssel-9", "character 7 of the key .*no ASCII letter"),
        ("sk-0123\x00456789", "character 7 of the key"),
    ],
)
@pytest.mark.parametrize("variable", [False, True])
def test_a_key_that_no_header_carries_is_named_and_not_shown(key, match, variable, monkeypatch):
    if variable and "\x00" not in key:
        monkeypatch.setenv("FALCON_KIT_TOKEN", key)
    with scripted(answering(Reply(DONE))) as server:
        with pytest.raises(ValueError, match=match) as refused:
            fk.connect(f"{server.address}/v1", token=None if variable and "\x00" not in key else key)
        assert key.strip() not in str(refused.value)
        assert server.requests == []
        if "strip" in str(refused.value):
            fk.connect(f"{server.address}/v1", token=key.strip())
            assert server.requests[0][2]["authorization"] == f"Bearer {key.strip()}"
