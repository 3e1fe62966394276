"""Settings: strict, with the key's path in every message."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import settings
from service.settings import Settings


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.touch()
    assert settings.read(path) == Settings()


def test_every_key_is_read(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(
        """
        [server]
        host = "0.0.0.0"
        port = 9000
        max_message_mib = 8
        shutdown_grace_s = 2
        [batching]
        max_batch_size = 4
        max_queue_size = 16
        max_queue_delay_ms = 1.5
        [engine]
        device = "cuda:1"
        provider = "tensorrt"
        threads = 2
        instances = 3
        rebuild = "auto"
        cache = "/var/cache/tenet"
        """
    )
    assert settings.read(path).model_dump() == {
        "server": {"host": "0.0.0.0", "port": 9000, "max_message_mib": 8, "shutdown_grace_s": 2.0},
        "batching": {"max_batch_size": 4, "max_queue_size": 16, "max_queue_delay_ms": 1.5},
        "engine": {
            "device": "cuda:1",
            "provider": "tensorrt",
            "threads": 2,
            "instances": 3,
            "rebuild": "auto",
            "cache": Path("/var/cache/tenet"),
        },
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", r"server\.prot: unknown key; remove it or correct its spelling"),
        ("[tls]\ncert = 'x'", r"tls: unknown key"),
        ("[server]\nport = 65536", r"server\.port: input should be less than or equal to 65535, got 65536"),
        ("[server]\nport = '8001'", r"server\.port: input should be a valid integer, got '8001'"),
        ("[batching]\nmax_queue_size = 0", r"batching\.max_queue_size: .*, got 0"),
        ("[batching]\nmax_queue_delay_ms = inf", r"batching\.max_queue_delay_ms: .*finite.*"),
        ("[engine]\ndevice = 'tpu'", r"engine\.device: device 'tpu': expected one of cpu, cuda, cuda:N"),
        ("[engine]\ndevice = 0", r"engine\.device: input should be a valid string, got 0"),
        ("[engine]\nprovider = 'CPU'", r"engine\.provider: input should be 'cpu', 'cuda', 'tensorrt' or .*, got 'CPU'"),
        (
            "[engine]\ndevice = 'cuda:1'\nprovider = 'cpu'",
            r"engine: provider 'cpu': expected device 'cpu', got 'cuda:1'; change one of them",
        ),
        ("[engine]\nthreads = 0", r"engine\.threads: input should be greater than or equal to 1, got 0"),
        ("[engine]\nrebuild = true", r"engine\.rebuild: input should be 'never' or 'auto', got True"),
        ("[engine]\ncache = 1", r"engine\.cache: .*path.*, got 1"),
        ("[engine]\ninstances = true", r"engine\.instances: .*, got True"),
        ("[server", "expected TOML"),
    ],
)
def test_mistakes_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"serve\.toml: {message}"):
        settings.read(path)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("[server]\nprot = 1\nport = -1\n")
    with pytest.raises(ValueError, match="server") as caught:
        settings.read(path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.toml: expected a settings file here, found none"):
        settings.read(tmp_path / "nothing.toml")


def test_the_command_line_may_give_another_address() -> None:
    base = Settings.model_validate({"server": {"port": 1}, "engine": {"threads": 2}})
    assert base.listening() == base
    given = base.listening(host="::1", port=0)
    assert (given.server.host, given.server.port, given.engine.threads) == ("::1", 0, 2)
    with pytest.raises(ValueError, match=r"port 70000: expected 0 to 65535"):
        base.listening(port=70000)
