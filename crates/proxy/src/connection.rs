//! One accepted connection.

use std::{net::SocketAddr, sync::Arc};

use palisade_abi::protocol;
use palisade_api::flow::L7;
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
            if pass(&gate, stream, Buffer::default(), is_allowed).await == Passed::Cut {
                let error = gate.why_cut().to_owned();
                gate.record(&gate.judge_stream().refused(), L7::Stream { error });
            }
        }
        Application::Dns => dns::serve_tcp(proxy, stream, client).await,
        Application::Tls => tls::serve(&gate, stream).await,
        Application::Denied => net::reset(&stream),
    }
}

/// How a connection ended.
#[derive(PartialEq, Eq)]
pub(crate) enum Passed {
    /// By itself.
    ToItsEnd,
    /// It was no longer allowed.
    Cut,
}

/// Relays whatever is said, what was read already first, as long as it is allowed.
pub(crate) async fn pass(
    gate: &Gate,
    client: TcpStream,
    mut from_client: Buffer,
    is_allowed: impl FnMut() -> bool,
) -> Passed {
    let Ok(server) = gate.connect().await else {
        net::reset(&client);
        return Passed::ToItsEnd;
    };
    let mut from_server = Buffer::default();
    let (relayed, passed) = tokio::select! {
        // The rules may be others than before the connection was made.
        biased;
        () = gate.until(gate.generation(), is_allowed) => (false, Passed::Cut),
        relayed = relay::run((&client, &mut from_client), (&server, &mut from_server)) => {
            (relayed.is_ok(), Passed::ToItsEnd)
        }
    };
    if !relayed {
        net::reset(&client);
        net::reset(&server);
    }
    passed
}
