//! One accepted connection.

use std::{net::SocketAddr, sync::Arc};

use palisade_abi::protocol;
use palisade_api::flow::L7;
use tokio::net::TcpStream;

use crate::{
    Proxy,
    buffer::Buffer,
    dns, http,
    judge::{Application, Gate, Judged},
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
            let judge = || gate.judge_stream();
            if let Some((judged, why)) = pass(&gate, stream, Buffer::default(), judge).await {
                gate.record(&judged, L7::Stream { error: why.to_owned() });
            }
        }
        Application::Dns => dns::serve_tcp(proxy, stream, client).await,
        Application::Tls => tls::serve(&gate, stream).await,
        Application::Denied => {
            let error = gate.why_denied();
            gate.record(&gate.judge_stream().refused(), L7::Stream { error });
            net::reset(&stream);
        }
    }
}

/// Relays whatever is said, what was read already first, as long as it is allowed. Returns what is
/// to be told where neither side ended it.
pub(crate) async fn pass(
    gate: &Gate,
    client: TcpStream,
    mut from_client: Buffer,
    judge: impl Fn() -> Judged,
) -> Option<(Judged, &'static str)> {
    let Ok(server) = gate.connect().await else {
        net::reset(&client);
        return Some((judge(), Gate::UNREACHABLE));
    };
    let mut from_server = Buffer::default();
    let (relayed, told) = tokio::select! {
        // The rules may be others than before the connection was made.
        biased;
        () = gate.until(gate.generation(), || judge().allowed) => {
            (false, Some((judge().refused(), gate.why_cut())))
        }
        relayed = relay::run((&client, &mut from_client), (&server, &mut from_server)) => {
            (relayed.is_ok(), None)
        }
    };
    if !relayed {
        net::reset(&client);
        net::reset(&server);
    }
    told
}
