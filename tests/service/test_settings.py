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
    read = settings.read(path).model_dump(exclude_defaults=True)
    assert read == {
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


def test_what_differs_for_one_model_replaces_the_table(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("[batching]\nmax_queue_size = 3\n[model.large.batching]\nmax_batch_size = 2\n")
    read = settings.read(path)
    assert read.of("other").batching.max_queue_size == 3
    large = read.of("large").batching
    assert (large.max_batch_size, large.max_queue_size) == (2, Settings().batching.max_queue_size)


def test_variables_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("[server]\nport = 1\nhost = '::1'\n")
    environment = {
        "TENET_SERVER__PORT": "2",
        "TENET_LOGGING__FORM": "json",
        "TENET_MODELS__LOAD": '["a", "b"]',
        "tenet_Model__ignored__cache__enabled": "true",
        "TENET_Model__ResNet_50__BATCHING__MAX_BATCH_SIZE": "4",
        "TENET_SERVER": "127.0.0.1:8001",
        "HOME": "/root",
    }
    read = settings.read(path, environment=environment)
    assert (read.server.host, read.server.port, read.logging.form) == ("::1", 2, "json")
    assert read.models.load == ("a", "b")
    # Models are called as their publishers wrote them.
    assert list(read.model) == ["ResNet_50"]
    assert read.of("ResNet_50").batching.max_batch_size == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TENET_SERVER__PRT", "1", r"environment: server\.prt: unknown key"),
        ("TENET_SERVER__PORT", "many", r"environment: server\.port: .*integer.*, got 'many'"),
        ("TENET_SERVER__PORT__X", "1", r"TENET_SERVER__PORT__X: .*port is no table"),
        ("TENET_SERVER__PORT", '9000\nhost = "x"', r"^TENET_SERVER__PORT: expected one TOML value, got others"),
        ("TENET_SERVER__PORT", "9000\n[auth]", r"^TENET_SERVER__PORT: expected one TOML value, got others"),
    ],
)
def test_mistakes_in_variables_name_them(tmp_path: Path, name: str, value: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("[server]\nport = 1\n")
    with pytest.raises(ValueError, match=message):
        settings.read(path, environment={name: value})


def test_every_process_has_a_page_of_metrics_of_its_own() -> None:
    chosen = Settings.model_validate({"metrics": {"port": 8002}})
    assert [chosen.for_process(index).metrics.port for index in range(2)] == [8002, 8003]
    assert Settings().for_process(1) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", r"server\.prot: unknown key; remove it or correct its spelling"),
        ("[tls]\ncert = 'x'", r"tls\.cert: unknown key"),
        ("[auth.tokens]\nname = 'x'", r"auth\.tokens: "),
        (
            "[server]\nfront = 'native'\n[tls]\ncertificate = 'a'\nkey = 'b'",
            r"document: server\.front: expected \"grpc\" with \[tls\]",
        ),
        (
            "[auth]\n[[auth.certificates]]\nname = 'x'\nroles = []",
            r"document: auth\.certificates: expected tls\.client_ca",
        ),
        ("[server]\nport = 65536", r"server\.port: expected at most 65535, got 65536"),
        ("[server]\nport = '8001'", r"server\.port: expected a valid integer, got '8001'"),
        ("[batching]\nmax_queue_size = 0", r"batching\.max_queue_size: .*, got 0"),
        ("[batching]\nmax_queue_delay_ms = inf", r"batching\.max_queue_delay_ms: .*finite.*"),
        ("[engine]\ndevice = 'tpu'", r"engine\.device: device 'tpu': expected one of cpu, cuda, cuda:N"),
        ("[engine]\ndevice = 0", r"engine\.device: expected a valid string, got 0"),
        ("[engine]\nprovider = 'CPU'", r"engine\.provider: expected 'cpu', 'cuda', 'tensorrt' or .*, got 'CPU'"),
        (
            "[engine]\ndevice = 'cuda:1'\nprovider = 'cpu'",
            r"engine: provider 'cpu': expected device 'cpu', got 'cuda:1'; change one of them",
        ),
        ("[engine]\nthreads = 0", r"engine\.threads: expected at least 1, got 0"),
        ("[engine]\nrebuild = true", r"engine\.rebuild: expected 'never' or 'auto', got True"),
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


PLAIN = "my-plain-secret-token"


@pytest.mark.parametrize(
    "tokens",
    [
        f'[[auth.tokens]]\nname = "us"\nsha256 = "{PLAIN}"\nroles = ["predict"]',
        f'[[auth.tokens]]\nname = "us"\nsha256 = ["{PLAIN}"]\nroles = ["predict"]',
        f'[[auth.tokens]]\nname = "us"\nsha256 = "{"0" * 64}"\nroles = ["{PLAIN}"]',
        f'[[auth.tokens]]\nname = "us"\ntoken = "{PLAIN}"',
        f'[auth]\ntokens = ["{PLAIN}"]',
        f'[auth]\ntokens = "{PLAIN}"',
        f'auth = "{PLAIN}"',
    ],
)
def test_a_token_where_its_hash_belongs_is_not_repeated(tmp_path: Path, tokens: str) -> None:
    """Mistakes end on stderr, and so in a journal."""
    path = tmp_path / "serve.toml"
    path.write_text(tokens)
    with pytest.raises(ValueError, match=r"auth") as raised:
        settings.read(path)
    assert PLAIN not in str(raised.value)


def test_a_token_in_the_environment_is_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"^environment: auth\.tokens: ") as raised:
        settings.read(environment={"TENET_AUTH__TOKENS": PLAIN})
    assert PLAIN not in str(raised.value)


@pytest.mark.parametrize("sha256", ["AB" * 32, "ab" * 31, "ab" * 32 + "\n", "g" * 64])
def test_what_is_no_hash_is_refused_with_the_way_out(sha256: str) -> None:
    with pytest.raises(ValueError, match=r"64 hexadecimal digits, letters in lower case, .*sha256sum"):
        settings.Token(name="us", sha256=sha256, roles=("predict",))
