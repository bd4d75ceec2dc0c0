"""TLS to a real Triton, with certificates made here: who trusts whom, and the errors where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cascade.errors import ModelServerError
from stages.deep.local_triton import LocalTriton, ServerTls
from stages.deep.repository import write_repository
from stages.deep.triton import TritonDeepStage
from stages.deep.triton_connection import GrpcOptions
from tests.certificates import Authority, make_authority
from tests.conftest import TinyDeepModel

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def repository(tiny_deep_model: TinyDeepModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tls") / "models"
    return write_repository(tiny_deep_model.path, tiny_deep_model.signature, out, "cpu")


@pytest.fixture(scope="module")
def server(triton_parts: Path, repository: Path, authority: Authority) -> Iterator[LocalTriton]:
    tls = ServerTls(*authority.issue("triton", ["127.0.0.1"]))
    with LocalTriton(repository, parts_dir=triton_parts, tls=tls) as running:
        yield running


@pytest.fixture(scope="module")
def mutual_server(triton_parts: Path, repository: Path, authority: Authority) -> Iterator[LocalTriton]:
    tls = ServerTls(*authority.issue("mutual-triton", ["127.0.0.1"]), clients=authority.ca_file)
    with LocalTriton(repository, parts_dir=triton_parts, tls=tls) as running:
        yield running


@pytest.fixture
def scores(tiny_deep_model: TinyDeepModel) -> Callable[[LocalTriton, GrpcOptions], int]:
    """Connects, waits until the model is ready, and says for how many of three rows there is a score."""

    def ask(triton: LocalTriton, options: GrpcOptions) -> int:
        stage = TritonDeepStage(triton.grpc_url, tiny_deep_model.signature, options=options)
        try:
            stage.wait_ready(3)
            return len(stage.submit(tiny_deep_model.inputs(3), 5).result())
        finally:
            stage.close()

    return ask


Scores = Callable[[LocalTriton, GrpcOptions], int]


def refusal(scores: Scores, triton: LocalTriton, options: GrpcOptions) -> str:
    with pytest.raises(ModelServerError, match=r"did not serve the model fraud_deep within 3 s") as caught:
        scores(triton, options)
    line = str(caught.value)
    assert "\n" not in line
    assert "deep.tls with its files" in line
    return line


def test_a_server_of_the_right_authority_is_trusted(server: LocalTriton, authority: Authority, scores: Scores) -> None:
    assert scores(server, GrpcOptions(ssl=True, root_certificates=authority.ca_file)) == 3


def test_a_server_of_another_authority_is_refused(server: LocalTriton, stranger: Authority, scores: Scores) -> None:
    line = refusal(scores, server, GrpcOptions(ssl=True, root_certificates=stranger.ca_file))
    assert "CERTIFICATE_VERIFY_FAILED" in line


def test_without_an_authority_of_ours_those_of_the_system_do_not_trust_it(server: LocalTriton, scores: Scores) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(scores, server, GrpcOptions(ssl=True))


def test_a_certificate_for_another_host_is_refused(
    triton_parts: Path, repository: Path, authority: Authority, scores: Scores
) -> None:
    tls = ServerTls(*authority.issue("elsewhere", ["elsewhere.example"]))
    with LocalTriton(repository, parts_dir=triton_parts, tls=tls) as running:
        line = refusal(scores, running, GrpcOptions(ssl=True, root_certificates=authority.ca_file))
    assert "Hostname Verification" in line


def test_the_certificate_must_name_the_configured_host_and_not_the_address_behind_it(
    triton_parts: Path, repository: Path, authority: Authority, tiny_deep_model: TinyDeepModel
) -> None:
    # as in a headless Service, whose pods have a certificate for its name
    tls = ServerTls(*authority.issue("service", ["triton.cascade.svc"]))
    options = GrpcOptions(ssl=True, root_certificates=authority.ca_file)
    with LocalTriton(repository, parts_dir=triton_parts, tls=tls) as running:
        port = running.grpc_url.rpartition(":")[2]

        def stage_for(host: str) -> TritonDeepStage:
            signature = tiny_deep_model.signature
            return TritonDeepStage(f"{host}:{port}", signature, options=options, resolve=lambda *_: ["127.0.0.1"])

        for host in ("triton.cascade.svc",):
            with closing(stage_for(host)) as stage:
                stage.wait_ready(20)
                assert len(stage.submit(tiny_deep_model.inputs(3), 5).result()) == 3
        with closing(stage_for("triton.other.svc")) as stage, pytest.raises(ModelServerError, match="Hostname Verif"):
            stage.wait_ready(3)


def test_a_client_without_tls_gets_nothing(server: LocalTriton, scores: Scores) -> None:
    refusal(scores, server, GrpcOptions())


def test_a_client_with_tls_gets_nothing_from_a_plain_server(
    triton: LocalTriton, authority: Authority, scores: Scores
) -> None:
    refusal(scores, triton, GrpcOptions(ssl=True, root_certificates=authority.ca_file))


def test_with_mutual_tls_a_client_with_a_certificate_is_served(
    mutual_server: LocalTriton, authority: Authority, scores: Scores
) -> None:
    certificate, key = authority.issue("worker", [])
    options = GrpcOptions(True, authority.ca_file, private_key=key, certificate_chain=certificate)
    assert scores(mutual_server, options) == 3


def test_with_mutual_tls_a_client_without_a_certificate_is_refused(
    mutual_server: LocalTriton, authority: Authority, scores: Scores
) -> None:
    refusal(scores, mutual_server, GrpcOptions(ssl=True, root_certificates=authority.ca_file))


def test_with_mutual_tls_a_certificate_of_another_authority_is_refused(
    mutual_server: LocalTriton, authority: Authority, stranger: Authority, scores: Scores
) -> None:
    certificate, key = stranger.issue("intruder", [])
    options = GrpcOptions(True, authority.ca_file, private_key=key, certificate_chain=certificate)
    refusal(scores, mutual_server, options)


def test_a_file_that_is_no_certificate_is_one_line(server: LocalTriton, tmp_path: Path, scores: Scores) -> None:
    wrong = tmp_path / "ca.pem"
    wrong.write_text("not a certificate\n")
    with pytest.raises(ModelServerError) as caught:
        scores(server, GrpcOptions(ssl=True, root_certificates=wrong))
    assert "\n" not in str(caught.value)
