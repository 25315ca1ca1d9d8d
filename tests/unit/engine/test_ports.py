import socket

from mesh_llm.engine.rpc_probe import ReservedPort


def bind_like_ggml(port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen(1)
    return server


def test_the_program_it_is_for_can_listen_while_it_is_held() -> None:
    with ReservedPort() as port:
        server = bind_like_ggml(port.number)
        with socket.create_connection(("127.0.0.1", port.number), timeout=5):
            pass
    server.close()


def test_two_are_never_the_same() -> None:
    ports = [ReservedPort() for _ in range(20)]
    assert len({port.number for port in ports}) == 20
    for port in ports:
        port.release()
        port.release()
