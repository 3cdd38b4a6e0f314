//! A connection to the API server for those who stay connected: one that dies without a word, as
//! when a node gets another address, is noticed and replaced soon.

use std::{
    error::Error,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context;
use http::Request;
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::{BoxError, ServiceBuilder, service_fn};

/// Seconds after which a quiet watch is renewed: a server that hangs, though its machine answers,
/// is noticed within this time.
pub const WATCH_SECONDS: u32 = 60;

/// A quiet connection is asked for a sign of life so often.
const PROBE: Duration = Duration::from_secs(5);
/// A connection whose far end acknowledged nothing for so long is dead.
const DEAD: Duration = Duration::from_secs(15);
/// Until a new connection, handshake included, has failed.
const CONNECT: Duration = Duration::from_secs(10);
/// Until a request without an answer has failed; longer than any watch is quiet.
const ANSWER: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// A client of the server that the kubeconfig leads to, or by default of the cluster in one of
/// whose pods this process runs.
///
/// # Errors
/// The kubeconfig cannot be read, or this process runs in no pod with a service account.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let (config, advice) = match kubeconfig {
        None => {
            let config = Config::incluster()
                .context("no --kubeconfig is given, and this is no pod with a service account")?;
            let advice = "where no kube-proxy serves this address, give the API server's own with \
                          apiServer.host of the chart";
            (config, advice.to_owned())
        }
        Some(file) => {
            let kubeconfig = Kubeconfig::read_from(file)
                .with_context(|| format!("cannot read the kubeconfig {}", file.display()))?;
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            (config, format!("{} says that it is there", file.display()))
        }
    };
    Ok(connect(&config, advice)?)
}

/// As `Client::try_from` does it, which has no way to say something about the sockets. Who asks in vain
/// asks again by himself, and is to hear of it first.
fn connect(config: &Config, advice: String) -> kube::Result<Client> {
    let mut tcp = HttpConnector::new();
    // What is below TLS.
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(PROBE));
    tcp.set_keepalive_interval(Some(PROBE));
    tcp.set_tcp_user_timeout(Some(DEAD));
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let mut connector = TimeoutConnector::new(tls);
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_read_timeout(Some(ANSWER));
    connector.set_reset_reader_on_write(true);
    let http = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let address = config.cluster_url.to_string();
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(move |error| unreachable(error, &address, &advice))
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// The same client, and a flag that is raised whenever the server begins a watch for it. Nothing else
/// tells a server that has no news from one that takes the request and never answers.
pub fn noticing(client: &Client) -> (Client, Arc<AtomicBool>) {
    let (asked, begun) = (client.clone(), Arc::new(AtomicBool::new(false)));
    let raised = Arc::clone(&begun);
    let service = service_fn(move |request: Request<Body>| {
        let (asked, raised) = (asked.clone(), Arc::clone(&raised));
        let watches = request.uri().query().is_some_and(|query| query.contains("watch=true"));
        async move {
            let answer = asked.send(request).await?;
            raised.fetch_or(watches && answer.status().is_success(), Relaxed);
            Ok::<_, kube::Error>(answer)
        }
    });
    (Client::new(service, client.default_namespace()), begun)
}

/// Nobody answers there: whoever reads this in a log is to know where, why and what to do.
#[derive(Debug, thiserror::Error)]
#[error("the API server at {address} cannot be reached: {cause}; {advice}")]
struct Unreachable {
    address: String,
    cause: String,
    advice: String,
}

fn unreachable(error: legacy::Error, address: &str, advice: &str) -> BoxError {
    if !error.is_connect() {
        return error.into();
    }
    let cause = chain(&error);
    Unreachable { address: address.to_owned(), cause, advice: advice.to_owned() }.into()
}

/// What an error says, and what each of its causes adds, down to the first one.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        next = error.source();
        let mut text = error.to_string();
        match error.downcast_ref() {
            // The server's own words; kube puts everything that it knows of them behind them.
            Some(kube::Error::Api(status)) if !status.message.is_empty() => {
                text.clone_from(&status.message);
                next = None;
            }
            Some(kube::Error::Service(_)) => continue,
            _ => {}
        }
        // Many repeat their cause, which is next.
        let cause = next.map(ToString::to_string);
        let own = cause.and_then(|cause| text.strip_suffix(&cause).map(str::to_owned));
        let own = own.map_or(text, |own| own.trim_end_matches([':', ' ']).to_owned());
        if !own.is_empty() {
            said.push(own);
        }
    }
    said.join(": ")
}

#[cfg(test)]
mod tests {
    use std::io;

    use kube::core::response::Status;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot list: {0}")]
    struct Repeats(#[source] kube::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot connect")]
    struct Silent(#[source] io::Error);

    #[test]
    fn every_cause_is_told_once_and_an_answer_in_the_servers_words() {
        let refused = || Silent(io::ErrorKind::ConnectionRefused.into());
        let service = || kube::Error::Service(Box::new(refused()));
        assert_eq!(chain(&service()), "cannot connect: connection refused");
        assert_eq!(chain(&Repeats(service())), "cannot list: cannot connect: connection refused");
        let status = Status { message: "no such name".into(), code: 422, ..Status::default() };
        let answer = kube::Error::Api(Box::new(status));
        assert_eq!(chain(&Repeats(answer)), "cannot list: no such name");
    }
}
