//! One accepted connection.

use std::{net::SocketAddr, sync::Arc};

use palisade_abi::protocol;
use tokio::net::TcpStream;

use crate::{
    Proxy,
    buffer::Buffer,
    dns, http,
    judge::{Application, Gate},
    net, relay, tls,
};

/// Serves a connection to its end. The address that it was made to is its local one.
pub(crate) async fn serve(proxy: &Arc<Proxy>, stream: TcpStream, client: SocketAddr) {
    let Ok(server) = stream.local_addr() else { return };
    _ = stream.set_nodelay(true);
    net::keep_alive(&stream);
    let gate = Gate::new(proxy, protocol::TCP, client, server);
    if !gate.is_redirected() {
        return net::reset(&stream);
    }
    match gate.application() {
        Application::Http => http::serve(&gate, stream).await,
        Application::Anything => {
            let is_allowed = || gate.application() == Application::Anything;
            pass(&gate, stream, Buffer::default(), is_allowed).await;
        }
        Application::Dns => dns::serve_tcp(proxy, stream, client).await,
        Application::Tls => tls::serve(&gate, stream).await,
        Application::Denied => net::reset(&stream),
    }
}

/// Relays whatever is said, what was read already first, as long as it is allowed.
pub(crate) async fn pass(
    gate: &Gate,
    client: TcpStream,
    mut from_client: Buffer,
    is_allowed: impl FnMut() -> bool,
) {
    let Ok(server) = gate.connect().await else { return net::reset(&client) };
    let mut from_server = Buffer::default();
    let relayed = tokio::select! {
        // The rules may be others than before the connection was made.
        biased;
        () = gate.until(gate.generation(), is_allowed) => false,
        relayed = relay::run((&client, &mut from_client), (&server, &mut from_server)) => relayed.is_ok(),
    };
    if !relayed {
        net::reset(&client);
        net::reset(&server);
    }
}
